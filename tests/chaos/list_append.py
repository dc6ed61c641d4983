"""Is a list-append history strictly serializable? A checker that knows nothing of the database.

Lists show the order of their writers: whoever reads ``[1, 2, 3]`` proves that 1 was appended before 2. From
this follow four kinds of edges between transactions (the method of Elle, Kingsbury and Alvaro, VLDB 2020):

====  ===================================================================
ww    appended the element before the other's, in one list
wr    appended the last element that the other read
rw    read a list that ends just before the other's element
rt    ended before the other began (strictness)
====  ===================================================================

A history is strictly serializable if and only if these have no cycle. Apart from cycles a read may be wrong
by itself: two reads of a list of which none begins the other, an element of a transaction that failed, half
of a transaction's elements, an element twice, one's own element missing; and an acknowledged element that
the last reads lack is lost.

One cycle is stock PostgreSQL's own. A commit there is visible before its backend hands in its predicate
locks, so that of three transactions of which each two overlap, all acknowledged,

    W --rw--> T --wr--> R --rw--> W

can pass SERIALIZABLE: R reads what T wrote while T is not yet known to have committed, and W, which T made
obsolete, commits last. That shape alone is reported as stock's, and its edge from R to W counts no further.

Real time enters through one node for each completion, in order, so that n transactions need 3n such edges.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tests.chaos.history import Append, Outcome, Read, Transaction, describe, origin_ns


class Edge(NamedTuple):
    """From one transaction (by its place in the history) to another, and why."""

    source: int
    target: int
    kind: str


@dataclass(frozen=True, slots=True)
class Anomaly:
    kind: str
    text: str
    """What was seen, with the operations of all transactions concerned."""


@dataclass(slots=True)
class Verdict:
    transactions: int = 0
    acknowledged: int = 0
    unknown: int = 0
    anomalies: list[Anomaly] = field(default_factory=list)
    stock_cycles: list[Anomaly] = field(default_factory=list)
    """Those that stock PostgreSQL lets pass too."""


def check(history: Iterable[Transaction]) -> Verdict:
    """The verdict on a whole history, whose last transactions should read every list once more."""
    transactions = sorted(history, key=lambda each: each.invoked_ns)
    return _Check(transactions).run()


class _Check:
    def __init__(self, transactions: Sequence[Transaction]) -> None:
        self._all = transactions
        self._origin_ns = origin_ns(transactions)
        self._writer: dict[int, int] = {}
        """Element -> place of the transaction that appended it."""
        self._lists: dict[int, tuple[int, ...]] = {}
        """Key -> the longest list that anybody read."""
        self._last_append: dict[tuple[int, int], int] = {}
        """(Place, key) -> the last element that this transaction appended there."""
        self._verdict = Verdict(
            transactions=len(transactions),
            acknowledged=sum(each.outcome is Outcome.OK for each in transactions),
            unknown=sum(each.outcome is Outcome.UNKNOWN for each in transactions),
        )

    def run(self) -> Verdict:
        self._index_appends()
        self._find_lists()
        seen = {
            self._writer[value]
            for values in self._lists.values()
            for value in values
            if value in self._writer
        }
        committed = {
            place
            for place, each in enumerate(self._all)
            if each.outcome is Outcome.OK or (each.outcome is Outcome.UNKNOWN and place in seen)
        }
        for place in sorted(committed):
            self._check_reads(place)
        self._check_final_lists()
        self._check_cycles(self._data_edges(committed), committed)
        return self._verdict

    def _report(self, kind: str, text: str, places: Iterable[int]) -> None:
        self._verdict.anomalies.append(Anomaly(kind, self._with_operations(text, places)))

    def _with_operations(self, text: str, places: Iterable[int]) -> str:
        lines = [f"  {describe(self._all[place], self._origin_ns)}" for place in dict.fromkeys(places)]
        return "\n".join([text, *lines])

    def _index_appends(self) -> None:
        for place, transaction in enumerate(self._all):
            for operation in transaction.operations:
                if isinstance(operation, Append):
                    if operation.value in self._writer:
                        raise ValueError(f"the history appends {operation.value} twice: it cannot be judged")
                    self._writer[operation.value] = place
                    self._last_append[place, operation.key] = operation.value

    def _find_lists(self) -> None:
        """The longest reads; every other one must begin like it."""
        longest: dict[int, tuple[tuple[int, ...], int]] = {}
        for place, key, values in self._reads():
            if key not in longest or len(values) > len(longest[key][0]):
                longest[key] = (values, place)
        for place, key, values in self._reads():
            whole, reader = longest[key]
            if whole[: len(values)] != values:
                self._report("incompatible order", f"list {key} was read in two orders", (place, reader))
        self._lists = {key: values for key, (values, _) in longest.items()}

    def _reads(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """What transactions that committed, or may have, read of others' elements."""
        for place, transaction in enumerate(self._all):
            if transaction.outcome is Outcome.FAILED:
                continue
            own: dict[int, list[int]] = defaultdict(list)
            for operation in transaction.operations:
                match operation:
                    case Append(key, value):
                        own[key].append(value)
                    case Read(key, values):
                        if not own[key] or transaction.outcome is Outcome.OK:
                            yield place, key, values

    def _check_reads(self, place: int) -> None:
        """What a committed transaction read, by itself and beside its own appends."""
        own: dict[int, list[int]] = defaultdict(list)
        for operation in self._all[place].operations:
            match operation:
                case Append(key, value):
                    own[key].append(value)
                case Read(key, values):
                    self._check_read(place, key, values, own[key])

    def _check_read(self, place: int, key: int, values: tuple[int, ...], own: list[int]) -> None:
        if len(set(values)) != len(values):
            self._report("duplicate element", f"list {key} was read with an element twice", (place,))
        if own and list(values[-len(own) :]) != own:
            self._report("own append missing", f"list {key} was read without its reader's own", (place,))
        others = values[: len(values) - len(own)] if own else values
        for value in others:
            writer = self._writer.get(value)
            if writer is None:
                self._report("unknown element", f"nobody appended {value} to list {key}", (place,))
            elif self._all[writer].outcome is Outcome.FAILED:
                self._report("aborted read", f"{value} in list {key} is of one that failed", (place, writer))
        writer = self._writer.get(others[-1]) if others else None
        if writer not in (None, place) and self._last_append.get((writer, key)) != others[-1]:
            self._report("intermediate read", f"list {key} ends within a transaction", (place, writer))

    def _check_final_lists(self) -> None:
        """An acknowledged element must be in its list, if anybody read that at all after it."""
        last_read_ns: dict[int, int] = {}
        for place, key, _ in self._reads():
            if self._all[place].outcome is Outcome.OK:
                last_read_ns[key] = max(last_read_ns.get(key, 0), self._all[place].invoked_ns)
        present = {key: set(values) for key, values in self._lists.items()}
        for place, transaction in enumerate(self._all):
            if transaction.outcome is not Outcome.OK:
                continue
            for operation in transaction.operations:
                if (
                    isinstance(operation, Append)
                    and last_read_ns.get(operation.key, 0) > transaction.completed_ns
                    and operation.value not in present[operation.key]
                ):
                    self._report("lost append", f"{operation.value} is not in list {operation.key}", (place,))

    def _data_edges(self, committed: set[int]) -> list[Edge]:
        edges: set[Edge] = set()
        for values in self._lists.values():
            for before, after in pairwise(values):
                self._add_edge(edges, self._writer.get(before), self._writer.get(after), "ww")
        for place, key, values in self._reads():
            if place not in committed:
                continue
            others = values
            while others and self._writer.get(others[-1]) == place:
                others = others[:-1]
            if others:
                self._add_edge(edges, self._writer.get(others[-1]), place, "wr")
            whole = self._lists[key]
            following = len(values)
            while following < len(whole) and self._writer.get(whole[following]) == place:
                following += 1
            if following < len(whole):
                self._add_edge(edges, place, self._writer.get(whole[following]), "rw")
        return sorted(edges)

    @staticmethod
    def _add_edge(edges: set[Edge], source: int | None, target: int | None, kind: str) -> None:
        if source is not None and target is not None and source != target:
            edges.add(Edge(source, target, kind))

    def _check_cycles(self, edges: list[Edge], committed: set[int]) -> None:
        stock = find_stock_shapes(edges, self._all)
        self._verdict.stock_cycles = [Anomaly("stock", self._describe_stock_cycle(each)) for each in stock]
        excused = {each[2] for each in stock}
        graph = self._graph([edge for edge in edges if edge not in excused], committed)
        for component in strong_components(graph):
            cycle = shortest_cycle(graph, component)
            self._report("cycle", *self._cycle_report(cycle, graph))

    def _graph(self, edges: list[Edge], committed: set[int]) -> dict[int, dict[int, str]]:
        """Places and, below zero, completions; a pair of places keeps the strongest reason."""
        graph: dict[int, dict[int, str]] = {place: {} for place in sorted(committed)}
        for edge in edges:
            if edge.source in graph and edge.target in graph:
                graph[edge.source].setdefault(edge.target, edge.kind)
        ended = sorted(
            (place for place in committed if self._all[place].outcome is Outcome.OK),
            key=lambda place: self._all[place].completed_ns,
        )
        moments = [self._all[place].completed_ns for place in ended]
        for index, place in enumerate(ended):
            graph[place][~index] = "rt"
            graph[~index] = {~(index + 1): "rt"} if index + 1 < len(ended) else {}
        before = 0
        for place in sorted(committed, key=lambda place: self._all[place].invoked_ns):
            while before < len(ended) and moments[before] < self._all[place].invoked_ns:
                before += 1
            if before:
                graph[~(before - 1)][place] = "rt"
        return graph

    def _cycle_report(self, cycle: list[int], graph: dict[int, dict[int, str]]) -> tuple[str, list[int]]:
        places = [node for node in cycle if node >= 0]
        kinds = []
        for place, following in pairwise([*places, places[0]]):
            kinds.append(f"T{self._all[place].id} --{graph[place].get(following, 'rt')}-->")
        return " ".join([*kinds, f"T{self._all[places[0]].id}"]), places

    def _describe_stock_cycle(self, cycle: tuple[Edge, Edge, Edge]) -> str:
        shape = " ".join(f"T{self._all[edge.source].id} --{edge.kind}-->" for edge in cycle)
        text = f"{shape} T{self._all[cycle[0].source].id}"
        return self._with_operations(text, (edge.source for edge in cycle))


def find_stock_shapes(
    edges: Iterable[Edge], transactions: Sequence[Transaction]
) -> list[tuple[Edge, Edge, Edge]]:
    """All cycles W -rw-> T -wr-> R -rw-> W of three acknowledged transactions that overlap pair by pair."""
    rw = {(edge.source, edge.target): edge for edge in edges if edge.kind == "rw"}
    readers: dict[int, list[Edge]] = defaultdict(list)
    for edge in edges:
        if edge.kind == "wr":
            readers[edge.source].append(edge)
    found = []
    for (w, t), first in rw.items():
        for second in readers[t]:
            r = second.target
            third = rw.get((r, w))
            three = [transactions[place] for place in (w, t, r)]
            if (
                third is not None
                and all(each.outcome is Outcome.OK for each in three)
                and three[0].overlaps(three[1])
                and three[1].overlaps(three[2])
                and three[2].overlaps(three[0])
            ):
                found.append((first, second, third))
    return found


def strong_components(graph: dict[int, dict[int, str]]) -> list[list[int]]:
    """Strongly connected components of more than one node (Tarjan, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in graph:
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = _pop_component(stack, on_stack, node)
                    if len(component) > 1:
                        found.append(component)
            elif target not in index:
                index[target] = low[target] = len(index)
                stack.append(target)
                on_stack.add(target)
                work.append((target, iter(graph[target])))
            elif target in on_stack:
                low[node] = min(low[node], index[target])
    return found


def _pop_component(stack: list[int], on_stack: set[int], root: int) -> list[int]:
    component = []
    while True:
        node = stack.pop()
        on_stack.discard(node)
        component.append(node)
        if node == root:
            return component


def shortest_cycle(graph: dict[int, dict[int, str]], component: list[int]) -> list[int]:
    """A cycle with the fewest transactions in a strongly connected component, in order."""
    members = set(component)
    best: list[int] = []
    for start in sorted(node for node in component if node >= 0):
        cycle = _cycle_through(graph, members, start)
        if not best or _weight(cycle) < _weight(best):
            best = cycle
    return best


def _weight(cycle: list[int]) -> int:
    return sum(node >= 0 for node in cycle)


def _cycle_through(graph: dict[int, dict[int, str]], members: set[int], start: int) -> list[int]:
    """Breadth first in steps between transactions: completions cost nothing."""
    came_from: dict[int, int] = {}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for target in graph[node]:
            if target == start:
                path = [node]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if target in members and target not in came_from:
                came_from[target] = node
                if target < 0:
                    queue.appendleft(target)
                else:
                    queue.append(target)
    raise AssertionError("a node of a strong component lies on a cycle")
