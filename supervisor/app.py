"""`supervisor run`: everything wired together, from the lock on the state folder to the exit code.

Order of life: lock, log, signals, embedded coordinator, host, link, proofs; each is opened inside the one before
it, so they end in the opposite order and the coordinator stops last. The first SIGTERM or SIGINT drains: no new
jobs, those that run get `limits.drain_s`. The second stops at once, and a third leaves without looking back;
children then die with us.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import secrets
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from protocol.faults import Fault
from protocol.link_wire import Capabilities
from supervisor import config, config_edit
from supervisor.box import Box
from supervisor.control.jobs_seen import JobBook
from supervisor.control.knock import knock
from supervisor.deployed import Deployed
from supervisor.drain import Drain
from supervisor.embedded import Ready, open_embedded
from supervisor.errors import ConfigError, ExitCode, GpuUnkillable, IdentityHeld, LinkRefused, SupervisorError
from supervisor.front import Behind, Front
from supervisor.host.family import members
from supervisor.host.host import Host, open_host
from supervisor.host.work import ModelSpec
from supervisor.intake.holds import Source
from supervisor.link import register
from supervisor.link.attempts import Attempts
from supervisor.link.dialects import DIALECTS
from supervisor.link.dialects.base import Features, Home, Spoken
from supervisor.link.keeping import OnDisk
from supervisor.link.outbox import Outbox
from supervisor.link.reconnect import Backoff, keep_link
from supervisor.link.remote import Refused, Remote
from supervisor.link.session import Address, SessionEnd, Why
from supervisor.link.shipping import Shipping
from supervisor.link.worker import Identity, Worker
from supervisor.live_settings import Parts, appliers
from supervisor.liveness import Liveness
from supervisor.machine.weights import Digests
from supervisor.model_uses import ModelUses
from supervisor.notices import Log, set_level, set_up
from supervisor.observe.cachesize import CacheSize
from supervisor.observe.instancewatch import InstanceWatch
from supervisor.observe.jobwatch import Watches
from supervisor.observe.otlp import open_tracer
from supervisor.observe.paces import Paces, identity_of
from supervisor.observe.spill import Spill
from supervisor.observe.spillwatch import SpillWatch
from supervisor.observe.tally import Tally
from supervisor.probe import probe_engine
from supervisor.proving import Prover, Verdicts
from supervisor.pulls import Pulls
from supervisor.reload import Outcome, Reloader
from supervisor.roster import Around, Roster
from supervisor.secrets import TOKEN, secret
from supervisor.served import Served
from supervisor.service import Service, status_sentence
from supervisor.settings import CoordinatorTable, LimitsTable, Settings
from supervisor.state import StateFolder, hold_state, write_endpoint
from supervisor.store import open_store
from supervisor.version import version

log = logging.getLogger(__name__)

# After the drain: for the last results and their acknowledgements.
LAST_WORDS_S = 3.0


def run(settings: Settings, path: Path | None = None) -> ExitCode:
    """Run the supervisor to its end.

    Args:
        path: of worker.toml, when its changes shall be followed.

    Raises:
        SupervisorError: it ends before it could begin, or the coordinator refused it; carries the exit code.
    """
    with hold_state(config.state_dir(settings)) as state:
        notices = set_up(settings.log)
        state.endpoint.unlink(missing_ok=True)  # one that was killed leaves it behind
        _warn_about_root()
        try:
            return trio.run(_Supervisor(settings, state, notices, path).live)
        except (SupervisorError, KeyboardInterrupt):
            raise
        except BaseException as error:
            plain = _plain(error)
            if isinstance(plain, SupervisorError | KeyboardInterrupt):
                raise plain from None
            log.critical("a mistake of ours ended everything", exc_info=error)
            return ExitCode.INTERNAL
        finally:
            state.endpoint.unlink(missing_ok=True)


class _Supervisor:
    """One life of the supervisor."""

    def __init__(
        self, settings: Settings, state: StateFolder, notices: Log | None = None, path: Path | None = None
    ) -> None:
        self._settings = settings
        self._notices = notices
        self._path = path
        self._state = state
        self._specs: Sequence[ModelSpec] = config.build_models(settings)
        self._service = Service()
        self._cache = CacheSize(state.root / "models")
        self._tally = Tally(
            models=[spec.name for spec in self._specs],
            engines={spec.engine.name for spec in self._specs},
            places={"state": state.root},
            cache_bytes=self._cache.bytes,
            log_lines=lambda: notices.funnel.lines if notices else {},
            log_dropped=lambda: notices.dropped() if notices else {},
        )
        self._tracer = open_tracer(settings.otel)
        self._jobs = JobBook()
        self._drain = Drain(lambda: self._limits.drain_s)
        self._now = trio.CancelScope()  # cancelled by the second signal
        self._refused: SupervisorError | None = None

    async def live(self) -> ExitCode:
        """Until drained, stopped or refused."""
        box = Box(self._settings, self._state)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._heed_signals)
            with self._now:
                await box.clear_leftovers(config.control_socket(self._settings))
                async with self._coordinator() as (address, drain_coordinator):
                    await self._work(box, address, drain_coordinator, nursery)
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._tracer.close)  # bounded by itself
        if self._refused is not None:
            raise self._refused
        return ExitCode.RESTART if self._drain.restart else ExitCode.STOPPED

    # ---- asking for the end

    async def _heed_signals(self, task_status: trio.TaskStatus[None]) -> None:
        seen = 0
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                seen += 1
                name = signal.Signals(number).name
                if seen == 1:
                    log.info("%s: draining for at most %g s; once more stops at once", name, self._limits.drain_s)
                    self._drain.ask(f"{name} was received")
                elif seen == 2:
                    log.warning("%s again: stopping at once", name)
                    self._now.cancel()
                else:
                    os._exit(ExitCode.INTERNAL)

    @property
    def _limits(self) -> LimitsTable:
        return self._settings.limits

    # ---- the coordinator

    @contextlib.asynccontextmanager
    async def _coordinator(self) -> AsyncIterator[tuple[Address, Callable[[], Awaitable[None]]]]:
        """Yields where the coordinator is, and what tells an embedded one of a drain."""
        table = self._settings.coordinator
        if table.url == "embedded":
            async with open_embedded(table, self._state.coordinator, self._coordinator_ready) as embedded:
                yield embedded.address, embedded.drain
            return

        async def nothing() -> None:
            await trio.lowlevel.checkpoint()

        yield _address(table), nothing

    def _coordinator_ready(self, ready: Ready) -> None:
        write_endpoint(self._state.endpoint, ready.url, ready.client_key_file)
        log.info("the coordinator answers at %s", ready.url)
        sys.stdout.write(f"Base URL    {ready.url}/v1\nClient key  in {ready.client_key_file}\n")
        sys.stdout.flush()

    # ---- the work

    async def _work(
        self, box: Box, address: Address, drain_coordinator: Callable[[], Awaitable[None]], around: trio.Nursery
    ) -> None:
        """Serve until the drain is over. `around` is for what outlives the engines, whose end may take its time."""
        served = Served(self._specs, box)
        self._specs = served.specs
        uses = ModelUses(Digests(self._state.digests).verify)
        prover = Prover(
            uses.verify,
            Verdicts(self._state.verdicts),
            lambda spec, proof: roster.proved(spec, proof),
            probe=functools.partial(probe_engine, folder=self._state.empty_probes(), watch=box.watch),
        )
        roster = Roster(lambda: self._settings, served, prover)
        means = box.means(uses.verify, prover.again, InstanceWatch(self._tally))
        async with (
            contextlib.AsyncExitStack() as stack,
            open_store(self._state.records) as store,
            open_host(self._specs, self._limits, self._state.instances, means=means) as host,
            self._spoken(box, roster, address) as spoken,
            trio.open_nursery() as nursery,
        ):
            stack.callback(uses.close)
            served.instances = host.snapshot
            keeping = OnDisk(store, Outbox(self._state.outbox, int(self._limits.outbox_gb * 2**30)))
            paces = Paces(self._state.paces, lambda model: self._pace_of(model, host), on_pace=self._tally.paced)
            stack.callback(paces.save)
            watches = Watches(self._tally, self._tracer, on_rate=paces.seen, listener=self._jobs)
            attempts = Attempts(host, spoken.delivery, host.ground, nursery, watches, keeping)
            attempts.every_line = self._features.lines
            attempts.restore(await keeping.restore())
            nursery.start_soon(keeping.run)
            attempts.on_done = box.watch_holds.note_good
            pulls = Pulls(self._path, nursery, box.spawn) if self._path is not None else None

            async def reload() -> None:
                if front.reloader is None:
                    raise Refused("The worker is still starting; order it again.")
                await front.reloader.reload("the coordinator deploys")

            deployed = Deployed(lambda: self._settings, pulls, roster, reload) if pulls is not None else None
            worker = self._worker(box, served, attempts, keeping, self._remote(prover, nursery, deployed), deployed)
            if self._notices is not None:
                nursery.start_soon(Shipping(self._notices.ring, worker.say).run)
            keeping.on_change = worker.announce
            box.pausing.on_warm = lambda models: self._warm(box, host, models)
            box.on_abort = lambda hold, models: attempts.stop_models(
                models, Fault("worker_stopping", f"The worker steps aside: {hold.reason or hold.source}.")
            )
            box.on_slept = worker.slept
            around.start_soon(box.watch.run)  # the end of an engine is over when its memory is seen to be back
            nursery.start_soon(box.run, host)
            worker.on_pause = lambda reason, for_s: box.pausing.put(Source.COORDINATOR, reason, for_s=for_s)
            worker.on_resume = lambda: box.pausing.lift(Source.COORDINATOR)
            nursery.start_soon(worker.keep_announced)
            nursery.start_soon(self._cache.run)
            told = {spec.name: _told(spec) for spec in self._specs}
            spill = Spill(self._tally.spilled)
            nursery.start_soon(SpillWatch(spill, host.snapshot, members, told).run)
            nursery.start_soon(spoken.warm_up)
            nursery.start_soon(self._link, spoken, worker)
            front = Front(
                Behind(
                    settings=lambda: self._settings,
                    state=self._state,
                    path=self._path,
                    box=box,
                    host=host,
                    served=served,
                    worker=worker,
                    attempts=attempts,
                    drain=self._drain,
                    url=address.url,
                    waits_for=lambda: spoken.waits_for,
                    tally=self._tally,
                    notices=self._notices,
                    jobs=self._jobs,
                    pulls=pulls,
                    slow=lambda model: spill.sentence(model) or paces.sentence(model),
                )
            )
            host.on_change = lambda: self._changed(worker, front)
            box.on_change = lambda: self._machine_changed(box, worker, front)
            self._drain.on_ask = front.look

            def joined(spec: ModelSpec) -> None:
                self._tally.joined(spec.name, spec.engine.name)
                told[spec.name] = _told(spec)

            concerned = Around(
                joined=joined,
                changed=lambda: self._changed(worker, front),
                keep_files=uses.keep_only,
                stopping=lambda: self._drain.reason,
            )
            await nursery.start(roster.run, host, attempts, concerned)
            if self._path is not None:
                front.reloader = self._reloader(self._path, box, host, roster, worker, front)
                await nursery.start(front.reloader.run)
            async with front.open():
                around.start_soon(self._liveness(box, served, worker).run)
                self._service.ready()
                await self._drain.asked.wait()
                self._service.stopping()
                nursery.start_soon(self._service.keep_extending)
                if not isinstance(self._refused, LinkRefused | IdentityHeld):  # else nobody takes what jobs bring
                    await self._drained(worker, attempts, drain_coordinator)
            self._drain.on_ask = lambda: None
            host.on_change = None
            box.on_change = lambda: None
            box.pausing.on_warm = lambda _models: None
            box.on_abort = lambda _hold, _models: None
            box.on_slept = lambda _seconds: None
            nursery.cancel_scope.cancel()

    @property
    def _features(self) -> Features:
        return DIALECTS[self._settings.coordinator.dialect].features

    def _spoken(self, box: Box, roster: Roster, address: Address) -> contextlib.AbstractAsyncContextManager[Spoken]:
        table = self._settings.coordinator
        name = self._state.worker_id(self._settings.worker.name)
        folder = self._state.root / table.dialect
        home = Home(table=table, address=address, folder=folder, name=name, person=box.watch_holds.person, roll=roster)
        return DIALECTS[table.dialect].open(home)

    def _reloader(self, path: Path, box: Box, host: Host, roster: Roster, worker: Worker, front: Front) -> Reloader:
        def take(settings: Settings) -> None:
            self._settings = settings
            worker.announce()

        def reloaded(outcome: Outcome) -> None:
            self._tally.reloaded("refused" if outcome.problems else "applied")
            front.reloaded(outcome)

        log_parts = self._notices.apply if self._notices else None
        parts = Parts(models=roster.follow, host=host.apply, holds=box.watch_holds.apply, log=log_parts)
        return Reloader(
            path,
            self._settings,
            appliers(lambda: self._settings, take, parts),
            on_outcome=reloaded,
            on_hangup=lambda: self._drain.ask("the terminal was closed"),
        )

    def _warm(self, box: Box, host: Host, models: Iterable[str]) -> None:
        """Load again what a hold has ended."""
        wanted = set(models)
        for spec in self._specs:
            if spec.name in wanted and not box.barred(spec):
                host.preload(spec.name)

    def _changed(self, worker: Worker, front: Front) -> None:
        worker.announce()
        front.look()

    def _pace_of(self, model: str, host: Host) -> str:
        """What the pace of a model belongs to; "" while it is not loaded."""
        spec = next((spec for spec in self._specs if spec.name == model), None)
        device = next((one.device for one in host.snapshot() if one.model == model and one.device), "")
        return identity_of(spec, device) if device and spec is not None else ""

    def _machine_changed(self, box: Box, worker: Worker, front: Front) -> None:
        self._changed(worker, front)
        if why := box.hopeless(self._specs):
            self._refused = self._refused or GpuUnkillable(why)
            self._drain.ask(why)

    def _liveness(self, box: Box, served: Served, worker: Worker) -> Liveness:
        def sentence() -> str:
            states = served.states()
            reason = box.pausing.reason()
            return status_sentence(
                models=len(states),
                ready=sum(state.available for state in states.values()),
                jobs=worker.running,
                holds=[reason] if reason else [],
                stopping=self._drain.reason,
            )

        liveness = Liveness(self._service, sentence)
        path = config.control_socket(self._settings)
        liveness.probe("the control socket", lambda: knock(path))
        return liveness

    def _worker(
        self,
        box: Box,
        served: Served,
        attempts: Attempts,
        keeping: OnDisk,
        remote: Remote,
        deployed: Deployed | None,
    ) -> Worker:
        def offered(not_accepting: str) -> Capabilities:
            return register.capabilities(
                served.offers(),
                labels=self._settings.worker.labels,
                machine=f"{platform.system()} {platform.machine()}",
                version=version(),
                not_accepting=not_accepting,
                gpus=box.gpus(),
                deploys=self._path is not None and bool(self._settings.coordinator.deploy.sources),
                vram_threshold_gb=self._settings.limits.vram_threshold_gb,
            )

        name = self._state.worker_id(self._settings.worker.name)
        return Worker(
            Identity(name=name, boot=secrets.token_hex(8)),
            attempts,
            offered=offered,
            models=served.states,
            on_shutdown=self._drain.ask,
            held=lambda: (box.pausing.reason() or keeping.reason(), box.pausing.left_s()),
            tally=self._tally,
            on_order=remote.begin,
            gpus=box.gpu_states,
            fetches=deployed.fetches if deployed is not None else tuple,
        )

    def _remote(self, prover: Prover, nursery: trio.Nursery, deployed: Deployed | None) -> Remote:
        """What the coordinator may order here."""

        async def probe(model: str) -> dict[str, str]:
            specs = [spec for spec in self._specs if model in ("", spec.name)]
            if not specs:
                raise Refused(f"There is no model {model[:100]!r} here.")
            return {spec.name: await prover.again(spec) or "it works" for spec in specs}

        async def configure(changes: Mapping[str, Any]) -> dict[str, str]:
            path = self._path
            if path is None:
                raise Refused("This supervisor runs without a file that could be changed.")
            try:
                await trio.to_thread.run_sync(config_edit.patch, path, changes)
            except SupervisorError as error:
                raise Refused(str(error)) from None
            return dict.fromkeys(changes, "written")  # the file is watched: what can change live does

        return Remote(
            nursery,
            set_level=set_level,
            probe=probe,
            configure=configure,
            allow=lambda: self._settings.coordinator.allow,
            deployed=deployed,
        )

    async def _link(self, spoken: Spoken, worker: Worker) -> None:
        end = await keep_link(lambda: spoken.converse(worker), Backoff())
        self._refused = _refusal(end, self._features)
        self._drain.ask(end.sentence)

    async def _drained(
        self, worker: Worker, attempts: Attempts, drain_coordinator: Callable[[], Awaitable[None]]
    ) -> None:
        """No new jobs; those that run get `drain_s`, then their end is told, then it is over."""
        log.info("draining: %s", self._drain.reason)
        worker.drain(self._drain.reason)
        await drain_coordinator()
        with self._drain.hurried, trio.move_on_after(self._limits.drain_s):
            await attempts.ledger.wait_empty()
        if left := attempts.ledger.running:
            log.warning("%d jobs did not end within the drain's %g s", left, self._limits.drain_s)
            attempts.stop_all(Fault("worker_stopping", "The worker stopped before the job was done."))
            with trio.move_on_after(self._limits.cancel_grace_s + LAST_WORDS_S):
                await attempts.ledger.wait_empty()
        log.info("drained")


def _told(spec: ModelSpec) -> int:
    """What the operator says that a load takes of the GPUs, in bytes; 0 where he does not."""
    return spec.vram_bytes * max(1, len(spec.model.devices))


def _address(table: CoordinatorTable) -> Address:
    try:
        token = secret(TOKEN, table.token_file) if DIALECTS[table.dialect].features.token else ""
        secure = table.url.startswith(("wss:", "https:"))
        tls = ssl.create_default_context(cafile=table.tls_ca or None) if secure else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"[coordinator]: the token or the certificates cannot be read: {error}"]) from None
    return Address(url=table.url, token=token, connect_s=table.connect_s, tls=tls)


def _refusal(end: SessionEnd, features: Features) -> SupervisorError:
    if end.why is Why.DUPLICATE:
        return IdentityHeld(f"Another supervisor works under this worker id: {end.sentence}.")
    cures = {
        Why.REFUSED: "check coordinator.token_file",
        Why.DELETED: "register this worker again",
        Why.REVISION: "update the older of the two",
    }
    # Dialects that bring their own way in name the cure themselves.
    cure = f"; {cures[end.why]}" if features.token else ""
    return LinkRefused(f"The coordinator refused this worker: {end.sentence.rstrip('.')}{cure}.")


def _plain(error: BaseException) -> BaseException:
    """The one error that ended everything, where there is one; else the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _warn_about_root() -> None:
    if os.geteuid() == 0:
        log.warning("running as root: a user of its own would do, and would lose less to a hostile model")
