"""The memory: every noun in, every noun out, each change in one short transaction.

A store is shared by threads and processes: writers queue up, readers see one state. What is kept is
checked on the way out, so a damaged row is an error and never a wrong policy.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, select

from ditune.db import migrate, policies
from ditune.db.digest import digest_bytes
from ditune.db.engine import (
    make_engine,
    parse_url,
    require_writable,
    sqlite_file,
)
from ditune.db.errors import CorruptData, UsageFault
from ditune.db.files import write_atomically
from ditune.db.jobs import Jobs
from ditune.db.parsing import parse
from ditune.db.record import now
from ditune.db.records import (
    Artifact,
    Hardware,
    Impacts,
    PolicyFile,
    Profile,
    Study,
    Trial,
    Workload,
)
from ditune.db.rows import body, insert_new, keep_trial, save_facts
from ditune.db.schema import (
    ActiveRow,
    ArtifactRow,
    EvidenceRow,
    PolicyRow,
    ProfileRow,
    StudyRow,
    TrialRow,
)
from ditune.db.transactions import Transactions
from ditune.db.tuning_rows import MoeTunings

_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})")


class Store(Transactions):
    """Everything that ditune remembers, behind one database. Make one with `Store.open`."""

    def __init__(self, engine: Engine, artifacts: Path | None) -> None:
        """Wrap an engine whose database has this release's schema."""
        super().__init__(engine)
        self.file = sqlite_file(engine.url)  # None where a server keeps the data
        self._artifacts = artifacts
        self.jobs = Jobs(engine)  # what is being evaluated, by whom
        self.moe = MoeTunings(engine)  # tiles of expert layers

    @classmethod
    def open(cls, url: str, artifacts: Path | None = None) -> Self:
        """Open a database, creating its tables if it is new.

        Args:
            url: A path, `sqlite:///FILE`, or `postgresql+psycopg://USER@HOST/NAME`.
            artifacts: The folder of kept files; by default `NAME.artifacts` beside `NAME.db`.

        Raises:
            UsageFault: The path or server cannot be opened or written, or is not ditune's.
            CorruptData: The database is damaged, or of an older or newer release.
            StoreFault: The disk is full, or another process holds the database.
        """
        parsed = parse_url(url)
        file = sqlite_file(parsed)
        if file is not None:
            require_writable(file)
            artifacts = artifacts or file.with_suffix(".artifacts")
        engine = make_engine(parsed)
        try:
            migrate.prepare(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, artifacts)

    def close(self) -> None:
        """Let go of the database; the store cannot be used after."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    # --- policies --------------------------------------------------------------------------------

    def save_policy(self, policy_file: PolicyFile) -> int:
        """Keep a policy with its evidence and return the evidence's number; twice is once.

        Raises:
            CorruptData: The file's `policy_id` is not the digest of its policy.
        """
        with self._writing() as session:
            return policies.keep(session, policy_file)

    def activate(self, evidence_id: int, tier: str = "default") -> None:
        """Make the policy of some evidence the one in use for its hardware and workload.

        Raises:
            UsageFault: There is no such evidence.
        """
        with self._writing() as session:
            policies.activate(session, evidence_id, tier)

    def save_and_activate(
        self, policy_file: PolicyFile, tiers: Collection[str] = ("default",)
    ) -> int:
        """Keep a policy and put it in use: all or nothing; return the evidence's number.

        Args:
            policy_file: What to keep.
            tiers: Under which of several trade-offs it is found.

        Raises:
            CorruptData: The file's `policy_id` is not the digest of its policy.
        """
        with self._writing() as session:
            evidence_id = policies.keep(session, policy_file)
            for tier in tiers:
                policies.activate(session, evidence_id, tier)
            return evidence_id

    def active(
        self, hardware: Hardware, workload: Workload, tier: str = "default"
    ) -> PolicyFile | None:
        """Return the policy in use for a hardware and workload, whatever the software."""
        query = (
            policies.stored()
            .join(ActiveRow, ActiveRow.evidence_id == EvidenceRow.id)
            .where(
                ActiveRow.hardware_key == hardware.key,
                ActiveRow.workload_key == workload.key,
                ActiveRow.tier == tier,
            )
        )
        with self._reading() as session:
            found = policies.read(session, query, self.where)
        return found[0] if found else None

    def policies(self) -> list[PolicyFile]:
        """Return every policy with every piece of its evidence, the last stored first."""
        with self._reading() as session:
            return policies.read(session, policies.stored(), self.where)

    def policies_of(self, transformer_class: str) -> list[PolicyFile]:
        """Return every policy that was proved for a class of models, the last stored first."""
        with self._reading() as session:
            return policies.of_transformer(session, transformer_class, self.where)

    def policy(self, prefix: str) -> PolicyFile:
        """Return the policy whose id begins with `prefix`, with its newest evidence.

        Args:
            prefix: Hexadecimal digits, with or without "sha256:" before them.

        Raises:
            UsageFault: No policy or more than one begins so.
        """
        digits = _PREFIX.fullmatch(prefix.lower())
        if digits is None:
            raise UsageFault(f"{prefix!r} is no policy id: give its first hexadecimal digits")
        query = policies.stored().where(PolicyRow.digest.startswith(f"sha256:{digits[1]}"))
        with self._reading() as session:
            found = policies.read(session, query, self.where)
        ids = {each.policy_id for each in found}
        if not found:
            raise UsageFault(f"{self.where} holds no policy {prefix}: see tune policy list")
        if len(ids) > 1:
            raise UsageFault(f"{len(ids)} policies begin with {prefix}: give more digits of its id")
        return found[0]

    def tiers_in_use(self, policy_file: PolicyFile) -> list[str]:
        """Return the tiers under which a lookup finds this policy with this evidence, by name."""
        with self._reading() as session:
            return policies.tiers(session, policy_file, self.where)

    def activations(
        self, hardware: Hardware, workload: Workload, tier: str = "default"
    ) -> list[str]:
        """Return the ids of the policies that were put in use, in that order."""
        with self._reading() as session:
            return policies.history(session, hardware.key, workload.key, tier)

    # --- searches --------------------------------------------------------------------------------

    def save_study(self, study: Study) -> None:
        """Keep a study; one that is known stays, with the arguments that it was last asked with.

        Raises:
            CorruptData: Another search is stored under the same name.
        """
        row = {"name": study.name, "body": body(study), "created_at": study.created_at}
        with self._writing() as session:
            insert_new(session, StudyRow, row)
            kept = session.get_one(StudyRow, study.name, with_for_update=True)
            stored = self._study(kept.body)
            if stored.settings != study.settings:
                raise CorruptData(
                    f"{self.where} holds another search under the name {study.name}: its settings "
                    "differ, so it is damaged; restore a backup, or use another database"
                )
            asked = {"arguments": study.arguments, "tier": study.tier}
            kept.body = body(stored.model_copy(update=asked))

    def study(self, name: str) -> Study | None:
        """Return a study by its name, None if there is none."""
        with self._reading() as session:
            row = session.get(StudyRow, name)
            return None if row is None else self._study(row.body)

    def studies(self) -> list[Study]:
        """Return every study, the oldest first."""
        query = select(StudyRow.body).order_by(StudyRow.created_at, StudyRow.name)
        with self._reading() as session:
            return [self._study(body) for body in session.scalars(query)]

    def save_trial(self, trial: Trial) -> None:
        """Keep a trial; told twice, the first report stays.

        Raises:
            UsageFault: Its study was never saved.
            StoreFault: Another trial of the study has its number.
        """
        with self._writing() as session:
            if session.get(StudyRow, trial.study) is None:
                raise UsageFault(f"{self.where} holds no study {trial.study}: save it first")
            keep_trial(session, trial)

    def trial(self, uuid: str) -> Trial | None:
        """Return a trial by its uuid, None if there is none yet."""
        with self._reading() as session:
            row = session.get(TrialRow, uuid)
            return None if row is None else parse(Trial, row.body, f"a trial in {self.where}")

    def trials(self, study: str) -> list[Trial]:
        """Return a study's trials by number."""
        query = select(TrialRow.body).where(TrialRow.study == study).order_by(TrialRow.number)
        with self._reading() as session:
            what = f"a trial in {self.where}"
            return [parse(Trial, body, what) for body in session.scalars(query)]

    def save_profile(self, profile: Profile) -> None:
        """Keep a profile beside older ones of the same pipeline."""
        with self._writing() as session:
            keys = save_facts(session, profile)
            session.add(ProfileRow(**keys, body=body(profile), created_at=now()))

    def profile(self, hardware: Hardware, workload: Workload) -> Profile | None:
        """Return the newest profile of a workload on a hardware."""
        query = (
            select(ProfileRow.body)
            .where(ProfileRow.hardware_key == hardware.key, ProfileRow.workload_key == workload.key)
            .order_by(ProfileRow.id.desc())
            .limit(1)
        )
        with self._reading() as session:
            body = session.scalar(query)
        return None if body is None else parse(Profile, body, f"a profile in {self.where}")

    def impacts(self, workload: Workload) -> Impacts | None:
        """Return the newest impacts of a workload, on whatever hardware they were measured."""
        query = (
            select(ProfileRow.body)
            .where(ProfileRow.workload_key == workload.key)
            .order_by(ProfileRow.id.desc())
        )
        with self._reading() as session:
            what = f"a profile in {self.where}"
            profiles = (parse(Profile, body, what) for body in session.scalars(query))
            return next((p.impacts for p in profiles if p.impacts is not None), None)

    # --- files -----------------------------------------------------------------------------------

    def save_artifact(self, data: bytes, media_type: str) -> Artifact:
        """Keep a file under its digest; the same bytes are kept once.

        Raises:
            UsageFault: The folder cannot be written, or a server's store was opened without one.
            StoreFault: The disk is full.
        """
        artifact = Artifact(sha256=digest_bytes(data), media_type=media_type, byte_count=len(data))
        path = self._path_of(artifact.sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageFault(f"{path.parent} cannot be made: {error.strerror}") from error
        # the file first: a row then never points to nothing
        if not path.is_file() or path.stat().st_size != len(data):
            write_atomically(path, data)
        with self._writing() as session:
            row = {**artifact.model_dump(), "created_at": now()}
            insert_new(session, ArtifactRow, row)
            kept = session.get_one(ArtifactRow, artifact.sha256)
            return artifact.model_copy(update={"media_type": kept.media_type})

    def artifact_path(self, sha256: str) -> Path:
        """Return where the bytes of an artifact lie.

        Raises:
            UsageFault: No such artifact was saved.
            CorruptData: Its file is missing or has another size.
        """
        with self._reading() as session:
            row = session.get(ArtifactRow, sha256)
            if row is None:
                raise UsageFault(f"{self.where} holds no artifact {sha256}")
            byte_count = row.byte_count
        path = self._path_of(sha256)
        if not path.is_file() or path.stat().st_size != byte_count:
            raise CorruptData(f"{path} is missing or damaged: restore it, or run the study again")
        return path

    def backup(self, path: Path) -> None:
        """Write a consistent copy of a SQLite database (not of its artifacts) to a new file.

        Raises:
            UsageFault: The file exists or cannot be written, or the data lies on a server.
            StoreFault: The disk is full.
        """
        if sqlite_file(self._engine.url) is None:
            raise UsageFault(f"{self.where} is a server's database: back it up with pg_dump")
        migrate.copy(self._engine, path)

    # --- inside ----------------------------------------------------------------------------------

    def _study(self, body: str) -> Study:
        return parse(Study, body, f"a study in {self.where}")

    def _path_of(self, sha256: str) -> Path:
        if self._artifacts is None:
            raise UsageFault(
                f"{self.where} is a server's database: open it with a folder for artifacts"
            )
        digits = sha256.removeprefix("sha256:")
        return self._artifacts / digits[:2] / digits[2:]
