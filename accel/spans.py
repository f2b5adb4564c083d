"""Run a denoiser with part of its blocks recorded or left out, without touching a block.

Stand-ins take the places of blocks in the model's own lists for the duration of one forward. The
model's loop stays in charge: what it does between blocks still happens. Compiled blocks keep their
graphs, because no block gains a hook or a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from ditune.accel.anatomy import block_lists
from ditune.accel.streams import Learner, Slot, Streams, as_tuple
from ditune.db.errors import UsageFault

Span = tuple[int, int]  # blocks that always run at the front and at the back of the chain
Residual = tuple[Tensor, ...]  # what a span adds to its streams, or makes of reshaped ones
_Run = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """The part of a span that lies in one list: blocks first to last, both included."""

    name: str
    first: int
    last: int


@dataclass
class Recording:
    """What one forward left behind; `residual` is asked after it."""

    spans: list[list[Segment]]
    entered: dict[tuple[str, int], dict[Slot, Any]] = field(default_factory=dict)
    left: dict[tuple[str, int], Any] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # of all of these, when kept
    residuals: list[Residual | None] = field(default_factory=list)


@dataclass
class _Lesson:
    """The first forward of a stack, watched whole."""

    order: list[str] = field(default_factory=list)  # of lists; equal neighbours are one
    learners: dict[str, Learner] = field(default_factory=dict)

    def enter(self, name: str, arguments: Mapping[Slot, Any]) -> None:
        """See a block of a list being called."""
        if self.order[-1:] != [name]:
            self.order.append(name)
        self.learners.setdefault(name, Learner()).enter(arguments)


class BlockStack:
    """The chain of blocks of one denoiser."""

    def __init__(self, model: nn.Module) -> None:
        """Find the chain.

        Raises:
            UsageFault: The model has no list of repeated blocks.
        """
        self.model = model
        self.names = tuple(block_lists(model))
        self.replaced = False  # whether stand-ins are in the model now
        self.problem = ""  # why spans cannot be left out, once that is known
        self._streams: dict[str, Streams] = {}
        self._copies = False  # what blocks took or returned may change afterwards
        self._kept_lists: dict[
            frozenset[tuple[str, int]], tuple[list[nn.Module], dict[str, nn.ModuleList]]
        ] = {}

    @property
    def lists(self) -> dict[str, nn.ModuleList]:
        """The lists as they stand in the model now."""
        return {name: cast(nn.ModuleList, self.model._modules[name]) for name in self.names}

    def named_blocks(self) -> dict[str, nn.Module]:
        """Return every block of the chain under its name in the model."""
        return {
            f"{name}.{index}": block
            for name, blocks in self.lists.items()
            for index, block in enumerate(blocks)
        }

    def __len__(self) -> int:
        """Return how many blocks the chain has."""
        return sum(len(blocks) for blocks in self.lists.values())

    def segments(self, span: Span) -> list[Segment]:
        """Return the parts of a span, one for each list that it touches."""
        front, back = span
        begin, end = front, len(self) - back
        found, offset = [], 0
        for name, blocks in self.lists.items():
            first, last = max(begin - offset, 0), min(end - offset, len(blocks)) - 1
            if first <= last:
                found.append(Segment(name, first, last))
            offset += len(blocks)
        return found

    # --- recording -----------------------------------------------------------------------------

    @contextmanager
    def recording(self, spans: Sequence[Span]) -> Iterator[Recording]:
        """Run everything, and keep what each span adds to the streams.

        After the block `residuals` has one entry for each span: None where it is empty or cannot be
        left out (`problem` then says why).
        """
        recording = Recording([self.segments(span) for span in spans])
        lesson = None if self._streams or self.problem else _Lesson()
        with self._replaced(self._recorders(recording, lesson)):
            yield recording
        if lesson is not None:
            self._learn(lesson)
        self._settle(recording)

    def _settle(self, recording: Recording) -> None:
        """Work out the residuals of a forward that has run."""
        changed = any(tensor._version != before for tensor, before in recording.versions)
        if self.problem or (changed and not self._copies):
            recording.residuals = [None] * len(recording.spans)
        else:
            recording.residuals = [self._residual(recording, span) for span in recording.spans]
        self._copies = self._copies or changed  # from the next forward on
        for held in (recording.entered, recording.left, recording.versions):
            held.clear()

    def _recorders(
        self, recording: Recording, lesson: _Lesson | None
    ) -> dict[tuple[str, int], _Run]:
        """Return a runner for every block that has something to tell."""
        enter = {(s.name, s.first) for span in recording.spans for s in span}
        leave = {(s.name, s.last) for span in recording.spans for s in span}
        keys = enter | leave
        self._notice_compiled()
        if lesson is not None:
            keys = {(n, i) for n, blocks in self.lists.items() for i in range(len(blocks))}

        def runner(key: tuple[str, int]) -> _Run:
            def run(block: nn.Module, arguments: dict[Slot, Any], call: _Run) -> Any:
                if key in enter:
                    recording.entered[key] = self._kept(arguments, recording)
                if lesson is not None:
                    lesson.enter(key[0], arguments)
                output = call()
                if key in leave:
                    kept = self._kept(dict(enumerate(as_tuple(output))), recording)
                    recording.left[key] = tuple(kept.values())
                if lesson is not None:
                    lesson.learners[key[0]].leave(arguments, output)
                return output

            return run

        return {key: runner(key) for key in keys}

    def _kept(self, values: Mapping[Slot, Any], recording: Recording) -> dict[Slot, Any]:
        """Return the values themselves, or copies where the model was seen to change them."""
        tensors = [v for v in values.values() if isinstance(v, Tensor) and not v.is_inference()]
        recording.versions += [(tensor, tensor._version) for tensor in tensors]
        if not self._copies:
            return dict(values)
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}

    def _residual(self, recording: Recording, segments: list[Segment]) -> Residual | None:
        found: list[Tensor] = []
        for segment in segments:
            key = (segment.name, segment.first)
            if key not in recording.entered or (segment.name, segment.last) not in recording.left:
                return None  # the model did not run these blocks this time
            streams = self._streams[segment.name]
            before = streams.entering(recording.entered[key])
            after = streams.leaving(recording.left[segment.name, segment.last])
            found += [
                b - a if a.shape == b.shape else b for a, b in zip(before, after, strict=True)
            ]
        return tuple(found) or None

    # --- learning ------------------------------------------------------------------------------

    def _learn(self, lesson: _Lesson) -> None:
        order = lesson.order
        if not order:
            self.problem = f"{type(self.model).__name__} did not run its blocks {self.names}"
            return
        if len(order) > len(lesson.learners):
            lists = " and ".join(lesson.learners)
            self.problem = f"its blocks alternate between {lists}"
            return
        for name, learner in lesson.learners.items():
            streams = learner.streams()
            if streams is None:
                kind = type(self.lists[name][0]).__name__
                self.problem = f"{kind} returns something that no next block takes"
                self._streams = {}
                return
            self._streams[name] = streams

    # --- leaving out ---------------------------------------------------------------------------

    @contextmanager
    def replacing(self, span: Span, residual: Residual) -> Iterator[None]:
        """Leave a span's blocks out and add what they added before.

        Raises:
            UsageFault: Nothing was recorded yet, or blocks cannot be left out of this model.
        """
        with self._replaced(self._skippers(span, residual)):
            yield

    @contextmanager
    def deciding(
        self, span: Span, residual: Residual, reuse: Callable[[Tensor], bool]
    ) -> Iterator[Recording]:
        """Run the blocks in front of a span, then leave the span out or record it.

        Args:
            span: With at least one block in front of it.
            residual: What the span added before.
            reuse: Told once what the blocks in front added to the first stream; its answer counts.

        Raises:
            UsageFault: Nothing was recorded yet, or blocks cannot be left out of this model.
        """
        recording = Recording([self.segments(span)])
        skippers = self._skippers(span, residual)
        recorders = self._recorders(recording, None)
        begin = next((name, 0) for name in self.names)
        entered: list[Tensor] = []
        verdict: list[bool] = []

        def runner(key: tuple[str, int]) -> _Run:
            def run(block: nn.Module, arguments: dict[Slot, Any], call: _Run) -> Any:
                stream = self._streams[key[0]].entering(arguments)[0]
                if key == begin:
                    entered.append(stream.clone() if self._copies else stream)
                    return call()
                if not verdict:
                    same = stream.shape == entered[0].shape
                    verdict.append(reuse(stream - entered[0] if same else stream))
                chosen = (skippers if verdict[0] else recorders).get(key)
                return chosen(block, arguments, call) if chosen is not None else call()

            return run

        with self._replaced({key: runner(key) for key in (begin, *skippers)}):
            yield recording
        self._settle(recording)

    def _skippers(self, span: Span, residual: Residual) -> dict[tuple[str, int], _Run]:
        """Return a runner for every block of a span that stands in for it."""
        if self.problem or not self._streams:
            raise UsageFault(
                f"blocks of {type(self.model).__name__} cannot be left out: "
                f"{self.problem or 'no forward was recorded yet'}"
            )
        self._notice_compiled()
        left = list(residual)
        runners: dict[tuple[str, int], _Run] = {}
        for segment in self.segments(span):
            streams = self._streams[segment.name]
            count = sum(slot is not None for slot in streams.slots)
            added, left = left[:count], left[count:]
            runners.update(_skipping(segment, streams, added, self._copies))
        return runners

    def _notice_compiled(self) -> None:
        """Copy streams from now on if blocks are compiled: CUDA graphs return their own memory."""
        first = (blocks[0] for blocks in self.lists.values())
        compiled = any(getattr(block, "_compiled_call_impl", None) is not None for block in first)
        self._copies = self._copies or compiled

    @contextmanager
    def _replaced(self, runners: Mapping[tuple[str, int], _Run]) -> Iterator[None]:
        """Let stand-ins take the places of some blocks."""
        originals = self.lists
        lists = self._with_stand_ins(frozenset(runners), originals)
        for (name, index), run in runners.items():
            object.__setattr__(lists[name][index], "run", run)
        self.replaced = True
        try:
            self.model._modules.update(lists)
            yield
        finally:
            self.model._modules.update(originals)
            self.replaced = False

    def _with_stand_ins(
        self, keys: frozenset[tuple[str, int]], originals: Mapping[str, nn.ModuleList]
    ) -> dict[str, nn.ModuleList]:
        """Return the lists with stand-ins at some places, built once and kept."""
        blocks = [block for listed in originals.values() for block in listed]
        known, lists = self._kept_lists.get(keys, ([], {}))
        if len(known) != len(blocks) or any(a is not b for a, b in zip(known, blocks, strict=True)):
            lists = {
                name: nn.ModuleList(
                    _StandIn(block) if (name, index) in keys else block
                    for index, block in enumerate(listed)
                )
                for name, listed in originals.items()
                if any(name == each for each, _ in keys)
            }
            self._kept_lists[keys] = (blocks, lists)
        return lists


class _StandIn(nn.Module):
    """Takes a block's place in its list and lets a runner decide; all else is the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._modules["block"] = block  # a hook that moves the model in mid-forward has to reach it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_modules"]["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block, run = self.__dict__["_modules"]["block"], self.__dict__["run"]
        arguments: dict[Slot, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        return run(block, arguments, lambda: block(*args, **kwargs))


def _skipping(
    segment: Segment, streams: Streams, added: Sequence[Tensor], copies: bool
) -> dict[tuple[str, int], _Run]:
    """Return runners that keep the streams as they enter and add the residual at the end.

    What the model does to the streams between the blocks is in the residual, and must not count a
    second time: the last runner goes back to what entered.
    """
    entered: list[Tensor] = []

    def run(index: int) -> _Run:
        def step(block: nn.Module, arguments: dict[Slot, Any], call: _Run) -> Any:
            if index == segment.first:
                held = streams.entering(arguments)
                entered[:] = [tensor.clone() for tensor in held] if copies else held
            if index < segment.last:
                return streams.passed(arguments)
            return streams.returned(
                [e + a if e.shape == a.shape else a for e, a in zip(entered, added, strict=True)]
            )

        return step

    return {(segment.name, i): run(i) for i in range(segment.first, segment.last + 1)}
