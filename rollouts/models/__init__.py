"""Models that write steps: backends (vLLM, OpenAI-compatible servers, transformers) and the step logic over them."""
