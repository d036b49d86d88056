"""A model that knows one text by heart, for tests of how generations become steps."""

from rollouts.models.base import Completion


class Recited:
    """A model that goes on with one text whatever it is asked, decoding and stopping as engines do."""

    def __init__(self, rules, prompt, text, *, tells_ids=True):
        self.rules, self.prompt, self.tells_ids = rules, prompt, tells_ids
        self.ids = (*rules.prompts.encode(text), rules.prompts.tokenizer.eos_token_id)

    def __call__(self, request):
        ids = self.ids[len(request.prompt_ids) - len(self.prompt) :][: request.max_tokens]
        text, finish = "", "length"
        for count, piece in enumerate(self.rules.prompts.pieces(request.prompt_ids, ids), 1):
            before, text = len(text), text + piece
            ends = [
                text.find(stop, max(0, before - len(stop) + 1)) + len(stop) for stop in request.stop if stop in text
            ]
            if ends:
                return self._told(text[: min(ends)], ids[:count], "stop")
        if ids and ids[-1] == self.ids[-1]:
            finish = "eos"
        return self._told(text, ids, finish)

    def _told(self, text, ids, finish):
        return Completion(text, len(ids), ids if self.tells_ids else None, finish)
