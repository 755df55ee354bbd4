"""worker.toml as structs. Reading, checking and editing the file is in config.py.

Every field has a default that works on a fresh box; unknown keys are errors. Relative paths belong to the folder
of worker.toml.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from supervisor.settings_dialects import GoliatTable, StudioTable

CONFIG_VERSION = 1

_Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]
_SecondsOrNever = Annotated[float, Meta(ge=0, le=7 * 86_400)]
_Gigabytes = Annotated[float, Meta(ge=0, le=1e6)]  # GiB


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all tables of worker.toml."""


class DeployTable(Table, frozen=True):
    """What a coordinator may have this worker serve: `[coordinator.deploy]`.

    Attributes:
        sources: patterns of addresses from which models may be fetched, such as "https://models.example.com/*" or
            "my-team/*" of Hugging Face; none lets the coordinator deploy nothing.
        engines: engines that may load them; none means all that need no program of the coordinator's choice.
        max_gb: GiB that all deployed models together may take on the disk.
        fetches: how many of them are fetched side by side.
        token_file: holds the token for the servers of the sources.
    """

    sources: list[Annotated[str, Meta(min_length=1, max_length=1000)]] = []
    engines: list[str] = []
    max_gb: _Gigabytes = 100.0
    fetches: Annotated[int, Meta(ge=1, le=8)] = 3
    token_file: str = ""


class CoordinatorTable(Table, frozen=True):
    """Where jobs come from.

    Attributes:
        url: "embedded" starts a coordinator as a supervised child; otherwise ws:// or wss:// of one.
        listen: HOST:PORT of the embedded coordinator; port 0 takes a free one.
        dialect: protocol spoken with the coordinator.
        token_file: file that holds this worker's token (remote coordinator); mode 0600.
        enrol_token_file: file with a one-time token, exchanged at the start for the one that token_file does not hold.
        tls_cert, tls_key: PEM files for the embedded coordinator's HTTPS.
        tls_ca: PEM file to trust for a remote coordinator.
        allow: keys of this file that the coordinator may change, such as "worker.labels" or "limits.*".
        connect_s: deadline over TCP + TLS + upgrade + welcome as a whole.
        deploy: which models the coordinator may bring here.
        studio: what only the dialect "studio" asks for.
        goliat: what only the dialect "goliat" asks for.
    """

    url: str = "embedded"
    listen: str = "127.0.0.1:8080"
    dialect: Literal["native", "studio", "goliat"] = "native"
    token_file: str = ""
    enrol_token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    allow: list[str] = []
    connect_s: _Seconds = 15.0
    deploy: DeployTable = DeployTable()
    studio: StudioTable = StudioTable()
    goliat: GoliatTable = GoliatTable()


class WorkerTable(Table, frozen=True):
    """Who this worker is.

    Attributes:
        name: the worker's id at the coordinator; "" makes one up once and keeps it in the state folder.
        state_dir: the folder for everything that outlives a run; "" means the default place.
        labels: free words for the coordinator, such as rack = "3".
    """

    name: str = ""
    state_dir: str = ""
    labels: dict[str, str] = {}


class EngineTable(Table, frozen=True):
    """One engine: `[engines.NAME]`.

    Attributes:
        module: for an engine of another repository.
        python: interpreter that has the engine's libraries; "" means the supervisor's own.
        device: default for its models.
        env: more environment for the child.
        sandbox: "require": refuse to start unless every layer is verified; "best-effort"; "off".
        network: "none", "loopback" (its own) or "host"; "" means what the engine needs.
        read, write, execute: more files and folders that it may touch.
        options: default load options for its models.
    """

    module: str = ""
    python: str = ""
    device: str = ""
    env: dict[str, str] = {}
    sandbox: Literal["require", "best-effort", "off"] = "best-effort"
    network: Literal["", "none", "loopback", "host"] = ""
    read: list[str] = []
    write: list[str] = []
    execute: list[str] = []
    options: dict[str, Any] = {}


class ModelTable(Table, frozen=True):
    """One model: `[[models]]`.

    Attributes:
        name: public name that clients ask for.
        engine: name of the engine.
        path: the main file or folder (role "model").
        files: further files by role.
        sha256: role -> hex; checked before the load when given.
        backend: which of the engine's libraries to use; "" lets the engine choose.
        kinds: narrower than what the engine can do; empty means all of its kinds.
        device: "cpu", "cuda" or "auto"; with "cuda" a fall back to the CPU is a failed load.
        gpus: UUIDs of the GPUs that it may use; empty means any. It lies on one of them, unless it is split.
        options: load options of the engine (n_ctx, compute_type, argv, …).
        preload: load at start instead of on first use.
        stall_s: longest time without progress of a run, instead of `[limits]`; 0 means those. A `command` may be
            silent for hours: for it only the job's deadline counts, unless this is set.
        keep_alive_s: an instance without work is ended after this long; 0 keeps it; without it, `[limits]` says.
        memory_gb: most resident memory of its instance, in GiB; 0 means what `[limits]` says.
        vram_gb: GPU memory that the load will need, in GiB, when the estimate from its files is wrong; 0 estimates.
        pin: load it at the start, and never end it for another model.
        group: of the models with the same word here only one is loaded at a time; "" for none.
        copies: most instances of it at once, on different GPUs or beside each other.
        split: spread it over several of its GPUs when it fits on none alone (engine llm).
    """

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    engine: str
    path: str = ""
    files: dict[str, str] = {}
    sha256: dict[str, Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")]] = {}
    backend: str = ""
    kinds: list[str] = []
    device: Literal["", "cpu", "cuda", "auto"] = ""
    gpus: list[str] = []
    options: dict[str, Any] = {}
    preload: bool = False
    stall_s: Annotated[float, Meta(ge=0, le=7 * 86_400)] = 0.0
    keep_alive_s: _SecondsOrNever | None = None
    memory_gb: _Gigabytes = 0.0
    vram_gb: _Gigabytes = 0.0
    pin: bool = False
    group: Annotated[str, Meta(max_length=100)] = ""
    copies: Annotated[int, Meta(ge=1, le=64)] = 1
    split: bool = False


class RestartTable(Table, frozen=True):
    """When an engine that ended badly is started again.

    Attributes:
        first_pause_s, longest_pause_s: pauses double from the second bad end in a row on, with jitter.
        healthy_s: an instance that lived this long, or did a job, clears the record.
        quarantine_after: bad ends in a row until the model is taken out of service.
        reprobe_s: after this long in quarantine the engine is probed, and returns when it passes; doubles each time.
    """

    first_pause_s: _Seconds = 1.0
    longest_pause_s: _Seconds = 60.0
    healthy_s: _Seconds = 60.0
    quarantine_after: Annotated[int, Meta(ge=2, le=1000)] = 5
    reprobe_s: _Seconds = 60.0


class RecycleTable(Table, frozen=True):
    """When a healthy instance is replaced between two jobs; 0 switches a reason off.

    Attributes:
        rss_growth_gb, vram_growth_gb: growth since its first jobs, in GiB.
        after_s: age.
        after_jobs: jobs done.
    """

    rss_growth_gb: _Gigabytes = 4.0
    vram_growth_gb: _Gigabytes = 1.0
    after_s: _SecondsOrNever = 0.0
    after_jobs: Annotated[int, Meta(ge=0)] = 0


class LimitsTable(Table, frozen=True):
    """Bounds on every wait. `*_stall_s`: the longest time without progress in that phase before it is ended.

    Attributes:
        drain_s: how long a drain waits for running jobs.
        start_s: spawn to hello.
        load_s: load without progress.
        first_output_s: run to first progress, chunk or result.
        stall_s: between two signs of progress of a run.
        cancel_grace_s: cancel to the end of the run, then the instance is ended.
        term_grace_s: SIGTERM to SIGKILL.
        job_s: default deadline of a job that brings none.
        keep_alive_s: an instance without work is ended after this long; 0 keeps it until its memory is wanted.
        memory_gb: most resident memory of one instance, in GiB; 0 means nine tenths of the box's.
        scratch_gb: most that one model's scratch folders may hold, in GiB.
        vram_margin_gb: GPU memory that is always left free, in GiB.
        outbox_gb: with so many GiB of results waiting for the coordinator, no more jobs are taken.
        vram_threshold_gb: most GPU memory that one job may say it needs, in GiB; 0 sets no limit.
    """

    drain_s: _Seconds = 60.0
    start_s: _Seconds = 60.0
    load_s: _Seconds = 600.0
    first_output_s: _Seconds = 300.0
    stall_s: _Seconds = 120.0
    cancel_grace_s: _Seconds = 5.0
    term_grace_s: _Seconds = 3.0
    job_s: _Seconds = 3600.0
    keep_alive_s: _SecondsOrNever = 0.0
    memory_gb: _Gigabytes = 0.0
    scratch_gb: Annotated[float, Meta(gt=0, le=1e6)] = 20.0
    vram_margin_gb: _Gigabytes = 0.5
    outbox_gb: Annotated[float, Meta(gt=0, le=1e6)] = 20.0
    vram_threshold_gb: _Gigabytes = 0.0
    restart: RestartTable = RestartTable()
    recycle: RecycleTable = RecycleTable()


class ControlTable(Table, frozen=True):
    """The owner's socket: `supervisor status`, `pause` and the like speak with it.

    Attributes:
        socket: its path; "" means control.sock in the state folder.
    """

    socket: str = ""


class PageTable(Table, frozen=True):
    """The page in a browser on this machine: `supervisor ui` opens it. Nobody else gets in, and nobody from outside.

    Attributes:
        enabled: serve it, on 127.0.0.1 and [::1] alone.
        port: 0 takes a free one.
    """

    enabled: bool = False
    port: Annotated[int, Meta(ge=0, le=65_535)] = 0


class LogTable(Table, frozen=True):
    """Log of the supervisor: on stderr always, in a file and at Sentry when they are named.

    Attributes:
        level: the least that is logged.
        format: of the lines on stderr.
        file: JSON lines go there as well; "" means no file.
        max_mb: size in MiB at which the file becomes FILE.1.
        keep: how many older files are kept.
        sentry_dsn_file: file that holds the DSN of a Sentry project; "" sends nothing.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    file: str = ""
    max_mb: Annotated[float, Meta(gt=0, le=1e6)] = 20.0
    keep: Annotated[int, Meta(ge=0, le=1000)] = 5
    sentry_dsn_file: str = ""


class OtelTable(Table, frozen=True):
    """Traces of jobs for OpenTelemetry.

    Attributes:
        endpoint: base URL of an OTLP/HTTP receiver, http://127.0.0.1:4318 for example; "" sends nothing.
        headers_file: file with one `name: value` a line, sent along (a token of the receiver); "" means none.
    """

    endpoint: Annotated[str, Meta(pattern="^(https?://.+)?$")] = ""
    headers_file: str = ""


_HoldMode = Literal["off", "stop", "unload", "abort"]
_Moment = Annotated[float, Meta(ge=0, le=86_400)]  # s
_Percent = Annotated[float, Meta(ge=0, le=100)]
# Days are optional: "22:00-07:00", "mon-fri 08:00-18:00". What is no day or time is found by machine/schedule.py.
_QuietHours = Annotated[str, Meta(pattern="^([a-z,-]+ )?[0-9]{2}:[0-9]{2}-[0-9]{2}:[0-9]{2}$")]


class ScheduleTable(Table, frozen=True):
    """No work in quiet hours: `[holds.schedule]`.

    Attributes:
        quiet: "22:00-07:00", with days before it when they matter: "mon-fri 08:00-18:00". The day is the one on
            which the hours begin. Equal ends mean a whole day.
        time_zone: "Europe/Zurich"; "" means the machine's own.
        mode: "stop" takes no more jobs; "unload" also ends idle models; "abort" ends running jobs, too, and frees
            the GPU at once; "off" never holds. The same words serve all tables of `[holds]`.
    """

    quiet: list[_QuietHours] = []
    time_zone: str = ""
    mode: _HoldMode = "stop"


class PresenceTable(Table, frozen=True):
    """No work while somebody uses this machine: `[holds.presence]`.

    Attributes:
        idle_s: without input for this long, the machine is free.
        enter_s: input or a film has to be seen for this long before work stops.
        when_unknown: "work" or "hold", when nothing can be told about input.
    """

    mode: _HoldMode = "off"
    idle_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    enter_s: _Moment = 2.0
    when_unknown: Literal["work", "hold"] = "work"


class BatteryTable(Table, frozen=True):
    """No work on battery: `[holds.battery]`.

    Attributes:
        below_percent: on battery, work stops at this charge or less; 100: always.
        above_percent: plugged in again, work goes on from this charge.
        enter_s, leave_s: for this long it has to be so.
    """

    mode: _HoldMode = "stop"
    below_percent: _Percent = 100.0
    above_percent: _Percent = 20.0
    enter_s: _Moment = 5.0
    leave_s: _Moment = 30.0


class ThermalTable(Table, frozen=True):
    """No work on a GPU that its driver slows down for heat or for want of power: `[holds.thermal]`.

    A power cap that the GPU meets under full load is no reason: that is what a cap is for.

    Attributes:
        celsius: from this temperature on, too; 0: only by the driver's word.
        cooler_by: degrees below `celsius` at which work goes on.
        enter_s, leave_s: for this long it has to be so.
    """

    mode: _HoldMode = "stop"
    celsius: Annotated[float, Meta(ge=0, le=150)] = 0.0
    cooler_by: Annotated[float, Meta(ge=0, le=100)] = 10.0
    enter_s: _Moment = 20.0
    leave_s: _Moment = 60.0


class ForeignVramTable(Table, frozen=True):
    """No work on a GPU that another program uses: `[holds.foreign_vram]`. Our own engines never count.

    Attributes:
        enter_gb, leave_gb: work stops when others hold this many GiB, and goes on when they hold at most that many.
        busy: work stops, too, when others keep the GPU busy for this share of the time, 0 to 1; 0: never.
        enter_s, leave_s: for this long it has to be so.
    """

    mode: _HoldMode = "off"
    enter_gb: Annotated[float, Meta(gt=0, le=1e6)] = 3.0
    leave_gb: _Gigabytes = 2.0
    busy: Annotated[float, Meta(ge=0, le=1)] = 0.0
    enter_s: _Moment = 5.0
    leave_s: _Moment = 20.0


class ApplicationsTable(Table, frozen=True):
    """No work while one of these programs runs: `[holds.applications]`.

    Attributes:
        names: of processes, as a task list shows them; "*" stands for anything; capitals do not matter.
        leave_s: work goes on this long after the last of them ended.
    """

    mode: _HoldMode = "unload"
    names: list[Annotated[str, Meta(min_length=1, max_length=200)]] = []
    leave_s: _Moment = 10.0


class DiskTable(Table, frozen=True):
    """No work when the disk of the state folder is nearly full: `[holds.disk]`.

    Attributes:
        floor_gb: work stops below this many free GiB.
        enough_gb: work goes on from this many.
        enter_s, leave_s: for this long it has to be so.
    """

    mode: _HoldMode = "stop"
    floor_gb: _Gigabytes = 0.5
    enough_gb: _Gigabytes = 1.0
    enter_s: _Moment = 5.0
    leave_s: _Moment = 30.0


class NetworkTable(Table, frozen=True):
    """No work while the network is metered: `[holds.network]`.

    Attributes:
        guesses: count what the system only guesses, too.
    """

    mode: _HoldMode = "off"
    guesses: bool = True
    enter_s: _Moment = 10.0
    leave_s: _Moment = 30.0


class EngineFailuresTable(Table, frozen=True):
    """No work after engines ended badly again and again: `[holds.engine_failures]`.

    Attributes:
        after: bad ends in a row, over all models; one job that is done clears the record.
        pause_s: then work goes on; the next bad end holds it again, for twice as long, at most a day.

    Off by default: a model that fails is taken out of service by itself, and need not take the others along.
    """

    mode: _HoldMode = "off"
    after: Annotated[int, Meta(ge=2, le=1000)] = 10
    pause_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0


class HoldsTable(Table, frozen=True):
    """When the worker steps aside by itself: `[holds]`. The operator's own pause is not configured."""

    schedule: ScheduleTable = ScheduleTable()
    presence: PresenceTable = PresenceTable()
    battery: BatteryTable = BatteryTable()
    thermal: ThermalTable = ThermalTable()
    foreign_vram: ForeignVramTable = ForeignVramTable()
    applications: ApplicationsTable = ApplicationsTable()
    disk: DiskTable = DiskTable()
    network: NetworkTable = NetworkTable()
    engine_failures: EngineFailuresTable = EngineFailuresTable()


class Settings(Table, frozen=True):
    """The whole of worker.toml.

    Attributes:
        config_version: of this file's keys; `supervisor config migrate` raises it.
        coordinator: where jobs come from.
        worker: who this worker is.
        engines: the programs that run models, by name.
        models: what is served.
        limits: bounds on every wait and on memory.
        control: the owner's socket.
        page: the same for a browser.
        holds: when the worker steps aside by itself.
        log: what is logged, and where.
        otel: traces for OpenTelemetry.
    """

    config_version: int = CONFIG_VERSION
    coordinator: CoordinatorTable = CoordinatorTable()
    worker: WorkerTable = WorkerTable()
    engines: dict[str, EngineTable] = {}
    models: list[ModelTable] = []
    limits: LimitsTable = LimitsTable()
    control: ControlTable = ControlTable()
    page: PageTable = PageTable()
    holds: HoldsTable = HoldsTable()
    log: LogTable = LogTable()
    otel: OtelTable = OtelTable()
