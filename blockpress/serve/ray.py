"""Many machines: the same application on replicas that Ray Serve starts, counts and replaces.

    client --HTTP--> Ray's proxy --> Ingress (Guard, the key of the prompt) --session_id--> PrefixRouter --> Served
                                        ^                                                                    |
                                        +------------ the application's ASGI messages, one by one -----------+

Ray's own proxy chooses a replica before it has read the body, so an ingress of ours reads it: the beginning of the
prompt is hashed, and a router ranks the living replicas for that hash as `blockpress serve --replicas` does.

Invariant: as there: a request that no replica has begun to answer is sent to another one, and a stream whose replica
dies ends with an error event in its API's form. Nothing of a prompt is in what Ray logs: the key is a hash.
Run it:  serve run blockpress.serve.ray:app model=sudoku-nano min_replicas=2
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from blockpress.engine import EngineOptions
from blockpress.errors import EngineError, RequestError, one_line
from blockpress.lm import load
from blockpress.serve.app import create_app
from blockpress.serve.errors import RETRY_AFTER, _ClientGone, _Refused, error_body
from blockpress.serve.guard import Guard
from blockpress.serve.options import MIB, ServeOptions
from blockpress.serve.replicas import TOGETHER, joined_answer, rendezvous, routing_key
from blockpress.serve.service import Service
from blockpress.serve.sse import cut_off, unless_gone

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle
try:
    from ray.serve.request_router import RequestRouter
except ImportError:  # `app` says what to install
    RequestRouter = object

logger = logging.getLogger("blockpress.serve")

REPLICA = b"x-blockpress-replica"
ATTEMPTS = 2
"""Replicas that one request may cost before it is refused: what broke two would break the others, too."""
GRACE = 5
"""Seconds beyond `patience` that Ray gives a replica whose answers have not ended."""
_SCOPE = {
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
}
"""What the application hears of a connection; the rest belongs to Ray's process."""

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)]


class RayOptions(BaseModel):
    """The arguments of `app`: those of `blockpress serve`, and how many replicas there are.

    Ray sets as many threads for a replica as it has `num_cpus`. num_gpus: 1 for a device `cuda`, else none.
    target_ongoing_requests: open requests of a replica that Ray aims at, between `min_replicas` and `max_replicas`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "sudoku-nano"
    name: str | None = None
    api_key: Annotated[Names, Field(repr=False)] = ()
    allow_origin: Names = ()
    allow_host: Names = ()
    max_running: Count = 32
    max_waiting: Count = 1024
    memory: Count | None = None
    max_body: Count = 32
    lenient: bool = False
    fetch_images: bool = False
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    device: str = "cpu"
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8
    num_cpus: Amount = 1
    num_gpus: Amount | None = None

    def rules(self) -> ServeOptions:
        """How clients are treated."""
        return ServeOptions(
            api_keys=self.api_key,
            origins=self.allow_origin,
            hosts=self.allow_host,
            max_body=self.max_body * MIB,
            max_streams=self.max_running + self.max_waiting,
            lenient=self.lenient,
            fetch_images=self.fetch_images,
            log_prompts=self.log_prompts,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
        )


def ray_options(given: Mapping[str, Any]) -> RayOptions:
    """Arguments as `serve run` or a configuration gives them, numbers as texts too.

    Raises:
        RequestError: one is unknown or wrong; it is named.

    >>> ray_options({"model": "sudoku-nano", "min_replicas": "2"}).max_replicas
    2
    """
    try:
        options = RayOptions(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = f"the arguments are {', '.join(RayOptions.model_fields)}"
        raise RequestError(f"{name} is {first['input']!r:.80}: {first['msg']}", hint=known) from error
    # The keys are this process's: those in which replicas run may have another environment.
    options.api_key = options.api_key or tuple(filter(None, os.environ.get("BLOCKPRESS_API_KEY", "").split(",")))
    if options.max_replicas is None:
        options.max_replicas = max(1, options.min_replicas)
    if options.max_replicas < options.min_replicas:
        raise RequestError(
            f"max_replicas is {options.max_replicas}, min_replicas {options.min_replicas}", hint="give more or fewer"
        )
    return options


def app(given: dict[str, Any]) -> Application:
    """Ray Serve's application: what `serve run` and a configuration's `import_path` name.

    Args:
        given: fields of `RayOptions`.

    Raises:
        RequestError: Ray is not installed, or an argument is wrong.
    """
    if RequestRouter is object:
        raise RequestError("Ray Serve is not installed", hint="pip install 'blockpress[ray]'")
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    options = ray_options(given)
    rules = options.rules()
    patience = {"graceful_shutdown_timeout_s": rules.patience + GRACE}
    gpus = options.num_gpus if options.num_gpus is not None else float(options.device.startswith("cuda"))
    served = serve.deployment(
        Served,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas or 1,
            target_ongoing_requests=options.target_ongoing_requests,
        ),
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        max_ongoing_requests=2 * rules.max_streams,  # beyond its own limit a replica refuses by itself, with status 429
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": gpus},
        **patience,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        max_ongoing_requests=2 * rules.max_streams * (options.max_replicas or 1),
        ray_actor_options={"num_cpus": 0},
        **patience,
    )
    return ingress.bind(served.bind(options), rules)


class PrefixRouter(RequestRouter):
    """Ranks the living replicas for the hash of a prompt; one that is much busier than another is asked later."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """One replica a rank, the best first: Ray asks the next where one is full or gone."""
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        load = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in replicas.items()}
        key = ""
        if pending_request is not None:
            key = pending_request.metadata.session_id
            pending_request.routing_context.should_backoff = True
        return [[replicas[name]] for name in rendezvous(key.encode(), load)]


@final
class Served:
    """A replica: the model, its engine and the whole application, which answers what the ingress passes on."""

    async def __init__(self, options: RayOptions) -> None:  # type: ignore[misc]  # Ray awaits it
        from ray.serve import get_replica_context

        types: dict[str, Any] = {name: getattr(options, name) for name in ("dtype", "compute_dtype", "device")}
        limits: dict[str, Any] = {"max_running": options.max_running, "max_waiting": options.max_waiting}
        engine = EngineOptions(**limits, memory=options.memory and options.memory * MIB)
        name = options.name or (Path(options.model).name if os.path.exists(options.model) else options.model)
        self._app = create_app(load(options.model, **types), name, options.rules(), engine)
        self._service: Service = self._app.state.service
        self._number = get_replica_context().replica_tag
        self._answering: set[asyncio.Task[None]] = set()
        await self._service.warm_up()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages with which the application answers a request, as they come.

        Whoever stops listening is a client that leaves: the application then ends what it has begun for it.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        unread, gone = [body], asyncio.Event()

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        self._answering.add(task)  # a task that nobody holds may be collected before it has ended
        task.add_done_callback(self._answering.discard)
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (REPLICA, self._number.encode())]}
                yield message
        finally:
            gone.set()

    async def said(self, scope: dict[str, Any]) -> tuple[str, bytes]:
        """The name of this replica, and the body of its answer to a request without one."""
        messages = [message async for message in self.answer(scope, b"")]
        return self._number, b"".join(message.get("body", b"") for message in messages)

    def check_health(self) -> None:
        """Ray asks, and replaces a replica that raises. Raises EngineError: the engine has broken."""
        if self._service.engine.broken:
            raise EngineError("the engine broke", hint="look at the log of this replica")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()


@final
class Ingress:
    """Reads a request, chooses the key of its replica, and passes the answer on."""

    def __init__(self, served: DeploymentHandle[Served], rules: ServeOptions) -> None:
        self._served, self._rules = served, rules

    def __serve_build_asgi_app__(self) -> Starlette:
        """What Ray calls for the application."""
        methods = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]
        together = [Route(path, self.together, methods=["GET"]) for path in TOGETHER]
        application = Starlette(routes=[*together, Route("/{path:path}", self.forward, methods=methods)])
        application.add_exception_handler(_ClientGone, lambda http, error: Response(status_code=499))
        application.add_middleware(Guard, options=self._rules)
        return application

    async def together(self, http: Request) -> Response:
        """One answer of what all replicas say."""
        from ray.serve.exceptions import DeploymentUnavailableError

        found: list[Any] = []
        scope = {name: value for name, value in http.scope.items() if name in _SCOPE}
        with suppress(DeploymentUnavailableError):  # there is none now
            found = await self._served.broadcast("said", scope).results_async(return_exceptions=True)
        said = sorted(each for each in found if not isinstance(each, BaseException))  # without those that were lost
        if not said and http.url.path != "/metrics":
            return await self.forward(http)  # it waits until there is one
        return joined_answer(http.url.path, dict(said))

    async def forward(self, http: Request) -> Response:
        """Pass a request to its replica, and the answer back as it comes."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        body = await http.body()
        key = hashlib.blake2b(routing_key(body), digest_size=16).hexdigest()
        scope = {name: value for name, value in http.scope.items() if name in _SCOPE}
        handle = self._served.options(method_name="answer", stream=True, session_id=key)
        for _ in range(ATTEMPTS):
            messages = handle.remote(scope, body)
            try:
                head = await unless_gone(messages.__anext__(), http)
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("a replica was lost before it answered: %s", one_line(error))
                continue
            except BaseException:
                messages.cancel()
                raise
            answer = StreamingResponse(self._rest(messages, head, http.url.path), head["status"])
            answer.raw_headers = head["headers"]
            return answer
        refused = _Refused(503, "no replica could answer", "send the request again later")
        return JSONResponse(error_body(http.url.path, refused), 503, {"Retry-After": str(RETRY_AFTER)})

    async def _rest(self, messages: Any, head: Message, path: str) -> AsyncIterator[bytes]:
        from ray.exceptions import RayActorError

        sent = 0
        try:
            async for message in messages:
                piece = message.get("body", b"")
                sent += piece.count(b"\n\n")
                yield piece
        except RayActorError as error:
            logger.warning("a replica was lost while it answered: %s", one_line(error))
            last = cut_off(path, dict(head["headers"]).get(b"content-type", b"").decode("latin-1"), sent)
            if not last:
                raise
            yield last
        finally:
            messages.cancel()
