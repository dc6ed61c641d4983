"""Looking inside over HTTP: a timeline's layer map, and how one page comes about.

For people and their tools. Answers are built from values that the engine has anyway; keys are given in
hex, to be compared, and in words.
"""

from typing import Annotated, Protocol

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.base.keys import KeyKind, describe_key, parse_key
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.pageserver.active_timeline import ActiveTimeline
from excimer.pageserver.page_name import parse_page_name
from excimer.pgformat.page_header import PageHeader, page_checksum
from excimer.storage.engine.page_explanation import ExplainedVisit, PageExplanation
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.value_description import describe_value

LSN_WAIT_S = 10.0
ID_PATTERN = "^[0-9a-fA-F]{32}$"
IdPath = Annotated[str, Path(pattern=ID_PATTERN, description="32 hex digits")]


class InspectedTenants(Protocol):
    """What is asked of the pageserver (`tenants.Tenants`)."""

    def active(self, tenant_id: TenantId, timeline_id: TimelineId) -> ActiveTimeline: ...
    def all_active(self) -> list[ActiveTimeline]: ...


class MemoryLayerAnswer(BaseModel):
    start_lsn: str
    end_lsn: str
    is_open: bool = Field(description="WAL is being added; the others wait to become durable")
    value_count: int
    size_bytes: int


class LayerAnswer(BaseModel):
    name: str
    kind: str = Field(description="delta or image")
    level: int = Field(description="of deltas: 0 is one flush, 1 is merged and cut by key")
    start_lsn: str
    end_lsn: str
    first_key: str
    last_key: str
    first_key_text: str
    last_key_text: str
    covers_after_lsn: str | None = Field(
        description="of images: all of this LSN together hold every key that changed after this one"
    )
    size_bytes: int
    value_count: int


class ChildAnswer(BaseModel):
    timeline_id: str
    lsn: str


class LayerMapAnswer(BaseModel):
    timeline_id: str
    ancestor_timeline_id: str | None
    ancestor_lsn: str | None
    oldest_lsn: str = Field(description="reads below are refused: the applied GC cutoff")
    disk_consistent_lsn: str
    last_record_lsn: str
    memory: list[MemoryLayerAnswer] = Field(description="newest first")
    layers: list[LayerAnswer] = Field(description="newest end first")
    branches: list[ChildAnswer]


class ValueAnswer(BaseModel):
    lsn: str
    kind: str
    starts_chain: bool = Field(description="nothing older matters")
    size_bytes: int
    text: str


class VisitAnswer(BaseModel):
    timeline_id: str
    layer: str | None = Field(description="null: a memory layer")
    kind: str
    level: int
    low_lsn: str = Field(description="values above this LSN were looked for")
    high_lsn: str = Field(description="... up to and including this one")
    values: list[ValueAnswer] = Field(description="newest first")


class HeaderAnswer(BaseModel):
    lsn: str
    checksum: int = Field(description="as it stands in the page; 0 without data checksums")
    computed_checksum: int = Field(description="what PostgreSQL would write there with data checksums")
    flags: list[str]
    lower: int
    upper: int
    special: int
    layout_version: int
    prune_xid: int
    is_new: bool


class ExplanationAnswer(BaseModel):
    page: str
    lsn: str
    pg_version: int
    visits: list[VisitAnswer]
    header: HeaderAnswer | None = Field(
        description="null: an SLRU page, which has none, or no page came of it"
    )
    problem: str | None = Field(description="why no page came of it")


def make_inspection_router(tenants: InspectedTenants) -> APIRouter:
    """Routes below ``/v1``; the caller adds authentication."""
    router = APIRouter(prefix="/v1")
    base = "/tenant/{tenant_id}/timeline/{timeline_id}"

    @router.get(base + "/layer_map", tags=["inspection"], summary="Every layer, and what lies around them")
    async def layer_map(tenant_id: IdPath, timeline_id: IdPath) -> LayerMapAnswer:
        active = tenants.active(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        return layer_map_answer(active.store, [other.store for other in tenants.all_active()])

    @router.get(base + "/explain_page", tags=["inspection"], summary="How a page comes about")
    async def explain(
        tenant_id: IdPath,
        timeline_id: IdPath,
        page: Annotated[str, Query(description="like '1663/5/16384 main 42' or 'pg_xact/0000 3'")],
        lsn: Annotated[str, Query(description="LSN; rounded down to where a record can end")],
    ) -> ExplanationAnswer:
        """Reads the page, watching: layer by layer what a read visits, each value, and the page's header."""
        key = parse_page_name(page)
        active = tenants.active(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        end_lsn = active.record_end(parse_lsn(lsn))
        await active.wait_for_lsn(end_lsn, LSN_WAIT_S)
        return explanation_answer(await active.store.explain_page(key, end_lsn), active.store.pg_version)

    return router


def layer_map_answer(store: Timeline, others: list[Timeline]) -> LayerMapAnswer:
    """`others`: timelines among which its branches are."""
    stack = store.stack
    memory = [
        MemoryLayerAnswer(
            start_lsn=format_lsn(layer.start_lsn),
            end_lsn=format_lsn(layer.newest_lsn),
            is_open=layer is stack.open,
            value_count=layer.value_count,
            size_bytes=layer.size_bytes,
        )
        for layer in stack.memory_layers
    ]
    ancestry = stack.ancestry
    children = [
        ChildAnswer(timeline_id=other.timeline_id, lsn=format_lsn(other.stack.ancestry.lsn))
        for other in others
        if other.stack.ancestry is not None and other.stack.ancestry.timeline is store
    ]
    return LayerMapAnswer(
        timeline_id=store.timeline_id,
        ancestor_timeline_id=None if ancestry is None else ancestry.timeline.timeline_id,
        ancestor_lsn=None if ancestry is None else format_lsn(ancestry.lsn),
        oldest_lsn=format_lsn(store.oldest_lsn),
        disk_consistent_lsn=format_lsn(store.disk_consistent_lsn),
        last_record_lsn=format_lsn(store.last_record_lsn),
        memory=memory,
        layers=[_layer_answer(layer) for layer in stack.disk.descriptions],
        branches=sorted(children, key=lambda child: parse_lsn(child.lsn)),
    )


def _layer_answer(layer: LayerDescription) -> LayerAnswer:
    covers = layer.covers_after_lsn
    return LayerAnswer(
        name=layer.name,
        kind=_kind(layer),
        level=layer.level,
        start_lsn=format_lsn(layer.start_lsn),
        end_lsn=format_lsn(layer.end_lsn),
        first_key=layer.first_key,
        last_key=layer.last_key,
        first_key_text=describe_key(bytes.fromhex(layer.first_key)),
        last_key_text=describe_key(bytes.fromhex(layer.last_key)),
        covers_after_lsn=None if covers is None else format_lsn(covers),
        size_bytes=layer.size_bytes,
        value_count=layer.value_count,
    )


def explanation_answer(explanation: PageExplanation, pg_version: int) -> ExplanationAnswer:
    return ExplanationAnswer(
        page=describe_key(explanation.key),
        lsn=format_lsn(explanation.lsn),
        pg_version=pg_version,
        visits=[_visit_answer(visit, pg_version) for visit in explanation.visits],
        header=_header_answer(explanation.key, explanation.page),
        problem=explanation.problem,
    )


def _visit_answer(visit: ExplainedVisit, pg_version: int) -> VisitAnswer:
    return VisitAnswer(
        timeline_id=visit.timeline_id,
        layer=None if visit.layer is None else visit.layer.name,
        kind="memory" if visit.layer is None else _kind(visit.layer),
        level=0 if visit.layer is None else visit.layer.level,
        low_lsn=format_lsn(visit.low_lsn),
        high_lsn=format_lsn(visit.high_lsn),
        values=[
            ValueAnswer(
                lsn=format_lsn(value.lsn),
                kind=value.kind.name.lower(),
                starts_chain=value.starts_chain,
                size_bytes=len(value.payload),
                text=describe_value(value, pg_version),
            )
            for value in visit.values
        ],
    )


def _header_answer(key: bytes, page: bytes | None) -> HeaderAnswer | None:
    fields = parse_key(key)
    if page is None or fields.kind != KeyKind.RELATION_BLOCK:
        return None
    header = PageHeader.unpack(page)
    return HeaderAnswer(
        lsn=format_lsn(header.lsn),
        checksum=header.checksum,
        computed_checksum=page_checksum(page, fields.block),
        flags=header.flag_names,
        lower=header.lower,
        upper=header.upper,
        special=header.special,
        layout_version=header.layout_version,
        prune_xid=header.prune_xid,
        is_new=header.is_new,
    )


def _kind(layer: LayerDescription) -> str:
    return "image" if layer.kind is LayerKind.IMAGE else "delta"
