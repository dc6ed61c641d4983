"""The route about how much of the local disk an endpoint's cache may take: for users, and its own compute."""

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from excimer.controller.endpoints.api_models import Body
from excimer.controller.shell import Controller


class ChangeCacheSizeBody(Body):
    cache_size_mib: int = Field(description="0: no bound.")


class CacheSizeAnswer(BaseModel):
    cache_size_mib: int


def make_cache_size_router(controller: Controller, allowed: Any) -> APIRouter:
    """`allowed`: the endpoint itself, and users."""
    router = APIRouter(prefix="/v1/endpoints/{name}/cache_size", tags=["endpoints"])

    @router.get("", dependencies=[Depends(allowed)])
    async def read_cache_size(name: str) -> CacheSizeAnswer:
        return CacheSizeAnswer(cache_size_mib=await controller.cache_sizes.read(name))

    @router.patch("", dependencies=[Depends(allowed)])
    async def change_cache_size(name: str, body: ChangeCacheSizeBody) -> CacheSizeAnswer:
        """A running compute takes a new bound over when it is told to look (SIGHUP), if it began with one."""
        size_mib = await controller.cache_sizes.change(name, body.cache_size_mib)
        return CacheSizeAnswer(cache_size_mib=size_mib)

    return router
