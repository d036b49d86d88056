"""The rollout tree of one problem and replica while it is being grown: its nodes, and what is still missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rollouts.store.rows import RowKey, TreeKey
from rollouts.tasks.problems import Problem
from rollouts.text.splitting import BLANK_LINE, Splitting
from rollouts.text.steps import CLOSE, LARGE, ROLES, ROOT_HASH, SMALL, Prefix, Step, extend_hash


@dataclass(slots=True, eq=False)
class Node:
    """A decision node: a prefix and the two models' proposals from it.

    Attributes:
        key: Hash of the list of accepted steps.
        used_tokens: Their tokens, each counted as features count it (`accepted_tokens`).
        escalations: Least number of escalations on a path to here.
        all_large: Whether the always-large path passes here.
        proposals: What each role has proposed so far.
        after: Key of the node that accepting a role's proposal leads to, or would if that did not end the solution.
        asked: Roles with a request under way.
        thinking: Whether it is within a thinking block.
    """

    key: int
    steps: tuple[str, ...]
    used_tokens: int
    escalations: int
    all_large: bool
    proposals: dict[str, Step] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    thinking: bool = False

    def accepted_tokens(self, role: str) -> int:
        """Return the tokens of an accepted proposal as features count them: the small model's if it wrote that text."""
        small = self.proposals.get(SMALL)
        step = self.proposals[role]
        tokens = small.tokens if small is not None and small.text == step.text else step.tokens
        return tokens or max(
            self.proposals[same].tokens for same in self.twins(role)
        )  # 0: of a step that is the other's

    def twins(self, role: str) -> Iterator[str]:
        """Yield the roles whose proposal has the text of `role`'s: `role` itself and perhaps the other."""
        text = self.proposals[role].text
        return (same for same in ROLES if same in self.proposals and self.proposals[same].text == text)


class Want(NamedTuple):
    """A proposal that is missing: at which node, by whom, and whether to ask for the whole rest."""

    node: Node
    role: str
    whole: bool


class RolloutTree:
    """One problem in one replica.

    Small proposals are inserted before large ones at every node that needs both, so that it is known at once
    whether the two models wrote the same step, and nodes never have to be re-counted.

    Where one model alone writes (`author`), its step is the proposal of both, at no tokens of the other, of prompts
    neither: whatever is decided leads to the same.

    Attributes:
        key: What names it: its problem's id and its replica.
        nodes: Its nodes by key, parents before children.
        relaxed: Whether some node learned of a cheaper way, or orphans found their node, since this was last set to
            False.
    """

    def __init__(
        self, problem: Problem, replica: int, max_escalations: int | None, splitting: Splitting = BLANK_LINE
    ) -> None:
        """Start with the root.

        Args:
            problem: The problem.
            replica: Index of the sample.
            max_escalations: K: grow every path with at most so many escalations, and the always-large path;
                None: grow the complete tree.
            splitting: How solutions are cut into steps.
        """
        self.problem = problem
        self.replica = replica
        self.max_escalations = max_escalations
        self.key: TreeKey = (problem.id, replica)
        self.splitting = splitting
        self.root = Node(ROOT_HASH, (), 0, 0, True, thinking=splitting.thinks)
        self.nodes = {ROOT_HASH: self.root}
        self.relaxed = False
        self._orphans: dict[int, dict[str, Step]] = {}  # by prefix and role

    @classmethod
    def from_rows(
        cls,
        problem: Problem,
        replica: int,
        max_escalations: int | None,
        rows: Iterable[tuple[int, str, Step]],
        splitting: Splitting = BLANK_LINE,
    ) -> RolloutTree:
        """Rebuild a tree from (prefix, role, step) rows of the step table; of duplicate keys the first wins.

        Rows that no path reaches (a shard between was set aside) are orphans and left out until one does.
        """
        tree = cls(problem, replica, max_escalations, splitting)
        for prefix, role, step in rows:
            tree._orphans.setdefault(prefix, {}).setdefault(role, step)
        tree._adopt(tree.root)
        return tree

    @property
    def orphans(self) -> int:
        """Steps of the store that no path reaches."""
        return sum(len(proposals) for proposals in self._orphans.values())

    def _adopt(self, node: Node) -> None:
        """Give a node, and all that this leads to, the proposals that the store has for them."""
        stack = [node]
        while stack:
            node = stack.pop()
            proposals = self._orphans.pop(node.key, {})
            for role in (LARGE, SMALL) if self.author(node) == LARGE else ROLES:
                if role in proposals and role not in node.proposals:
                    child = self._insert(node, role, proposals[role])
                    if child is not None and child not in stack:
                        stack.append(child)

    def insert(self, node: Node, role: str, step: Step) -> Node | None:
        """Record a proposal; return the node it leads to, or None if it is terminal."""
        child = self._insert(node, role, step)
        if child is not None and child.key in self._orphans:
            self._adopt(child)
            self.relaxed = True
        return child

    def author(self, node: Node) -> str | None:
        """Return the role that alone writes at a node; None where both propose."""
        return self.splitting.author(thinking=node.thinking)

    def _insert(self, node: Node, role: str, step: Step) -> Node | None:
        child = self._put(node, role, replace(step, thinking=True) if node.thinking else step)
        if self.author(node) == role:
            other = ROLES[1 - ROLES.index(role)]
            if other not in node.proposals:
                self._put(node, other, replace(step, tokens=0, prompt_tokens=0, statistics=None))
        return child

    def _put(self, node: Node, role: str, step: Step) -> Node | None:
        node.proposals[role] = step
        key = node.after[role] = extend_hash(node.key, step.text)
        if step.terminal:
            return None
        escalations = node.escalations + (role == LARGE)
        all_large = node.all_large and role == LARGE
        child = self.nodes.get(key)
        if child is None:
            used = node.used_tokens + node.accepted_tokens(role)
            thinking = node.thinking and CLOSE not in step.text
            child = Node(key, (*node.steps, step.text), used, escalations, all_large, thinking=thinking)
            self.nodes[key] = child
        else:
            self._relax(child, escalations, all_large)
        return child

    def _relax(self, node: Node, escalations: int, all_large: bool) -> None:
        """Tell a node, and all below it, of another way to reach it: answers come in any order."""
        if escalations >= node.escalations and (node.all_large or not all_large):
            return
        node.escalations = min(node.escalations, escalations)
        node.all_large = node.all_large or all_large
        self.relaxed = True
        for role in node.proposals:
            if (child := self.child(node, role)) is not None:
                self._relax(child, node.escalations + (role == LARGE), node.all_large and role == LARGE)

    def insert_path(self, node: Node, role: str, steps: Sequence[Step]) -> list[tuple[Node, Step]]:
        """Record the consecutive steps of one generation, stopping where a proposal is there already.

        Returns:
            The proposals that are new, with their nodes.
        """
        new: list[tuple[Node, Step]] = []
        position: Node | None = node
        for step in steps:
            if position is None or role in position.proposals or self.author(position) not in (None, role):
                break
            new.append((position, step))
            position = self.insert(position, role, step)
        return new

    def lacks(self, node: Node) -> list[str]:
        """Return the roles whose proposals closure asks for at a node and that are not there."""
        cap = self.max_escalations
        needed = {
            SMALL: cap is None or node.escalations <= cap,
            LARGE: cap is None or node.escalations < cap or node.all_large,
        }
        if author := self.author(node):
            needed = {author: any(needed.values())}
        return [role for role in needed if needed[role] and role not in node.proposals]

    def wants(self, roles: Collection[str] = ROLES) -> list[Want]:
        """Return the proposals that are missing, not asked for, and can be asked for now."""
        return [want for node in self.nodes.values() for want in self.wants_at(node, roles)]

    def wants_at(self, node: Node, roles: Collection[str] = ROLES) -> Iterator[Want]:
        """Yield what `wants` would, for one node."""
        for role in self.lacks(node)[:1]:
            if role in roles and role not in node.asked:
                # beyond K only the always-large path goes on: ask for all of it
                beyond = self.max_escalations is not None and node.escalations >= self.max_escalations
                yield Want(node, role, role == SMALL or beyond or self.author(node) is not None)

    def missing(self) -> int:
        """Return how many proposals closure still asks for at the nodes that exist."""
        return sum(len(self.lacks(node)) for node in self.nodes.values())

    def prefix(self, node: Node) -> Prefix:
        """Return what a model is asked to continue at a node."""
        return Prefix(self.problem.id, self.problem.question, self.replica, node.steps, node.used_tokens)

    def child(self, node: Node, role: str) -> Node | None:
        """Return the node that accepting `role`'s proposal leads to, or None if it is terminal or missing."""
        step = node.proposals.get(role)
        return None if step is None or step.terminal else self.nodes[node.after[role]]

    def row_key(self, node: Node, role: str) -> RowKey:
        """Return what joins the rows of all tables to a proposal that is there: its place and its content."""
        return (self.problem.id, self.replica, node.key, role, node.after[role])

    def places(self) -> Iterator[Place]:
        """Yield where there are proposals."""
        for node in self.nodes.values():
            for role in node.proposals:
                yield self, node, role


Place = tuple[RolloutTree, Node, str]  # a proposal that is there or may be: tree, node, role
