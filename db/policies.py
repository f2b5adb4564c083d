"""Policies in the database: kept under their digest, with evidence, and one in use per key."""

from __future__ import annotations

from sqlalchemy import Row, Select, select
from sqlalchemy.orm import Session

from ditune.db.errors import CorruptData, UsageFault
from ditune.db.parsing import address_of, parse, parse_addressed
from ditune.db.policy import Policy
from ditune.db.record import now
from ditune.db.records import SCHEMA_VERSION, Evidence, Hardware, PolicyFile, Software, Workload
from ditune.db.rows import body, insert_new, save_facts
from ditune.db.schema import (
    ActiveHistoryRow,
    ActiveRow,
    EvidenceRow,
    HardwareRow,
    PolicyRow,
    SoftwareRow,
    WorkloadRow,
)

# what `read` needs of each policy, in this order
Stored = tuple[str, int, str, str, str, str, str, str, str, str]


def keep(session: Session, policy_file: PolicyFile) -> int:
    """Keep a policy and its evidence and return the evidence's number; twice is once.

    Raises:
        CorruptData: The file's `policy_id` is not the digest of its policy.
    """
    if address_of(policy_file.policy, "the policy") != policy_file.policy_id:
        raise CorruptData(
            f"the policy id {policy_file.policy_id} does not match the policy that came with it: "
            "it was changed or damaged, get an intact copy"
        )
    keys = save_facts(session, policy_file)
    row = {
        "digest": policy_file.policy_id,
        "schema_version": policy_file.schema_version,
        "body": body(policy_file.policy),
        "created_at": now(),
    }
    insert_new(session, PolicyRow, row)
    proof = {"policy": policy_file.policy_id, **keys, "body": body(policy_file.evidence)}
    known = session.scalar(select(EvidenceRow.id).filter_by(**proof))
    if known is not None:
        return known
    added = EvidenceRow(**proof, created_at=policy_file.evidence.created_at)
    session.add(added)
    session.flush()
    return added.id


def activate(session: Session, evidence_id: int, tier: str) -> None:
    """Point a hardware, workload and tier to some evidence, and write the change down.

    Raises:
        UsageFault: There is no such evidence.
    """
    evidence = session.get(EvidenceRow, evidence_id)
    if evidence is None:
        raise UsageFault(f"there is no evidence {evidence_id}: save its policy first")
    key = {
        "hardware_key": evidence.hardware_key,
        "workload_key": evidence.workload_key,
        "tier": tier,
    }
    insert_new(session, ActiveRow, {**key, "evidence_id": evidence_id})
    pointer = session.get_one(ActiveRow, key, with_for_update=True)
    last = (
        select(ActiveHistoryRow.evidence_id)
        .filter_by(**key)
        .order_by(ActiveHistoryRow.id.desc())
        .limit(1)
    )
    if session.scalar(last) != evidence_id:
        pointer.evidence_id = evidence_id
        session.add(ActiveHistoryRow(**key, evidence_id=evidence_id, created_at=now()))


def history(session: Session, hardware_key: str, workload_key: str, tier: str) -> list[str]:
    """Return the ids of the policies in use for a key and tier, the oldest first."""
    query = (
        select(EvidenceRow.policy)
        .join(ActiveHistoryRow, ActiveHistoryRow.evidence_id == EvidenceRow.id)
        .where(
            ActiveHistoryRow.hardware_key == hardware_key,
            ActiveHistoryRow.workload_key == workload_key,
            ActiveHistoryRow.tier == tier,
        )
        .order_by(ActiveHistoryRow.id)
    )
    return list(session.scalars(query))


def tiers(session: Session, policy_file: PolicyFile, where: str) -> list[str]:
    """Return the tiers under which a policy is in use with the evidence that it comes with."""
    query = (
        select(ActiveRow.tier, EvidenceRow.body)
        .join(EvidenceRow, EvidenceRow.id == ActiveRow.evidence_id)
        .where(
            EvidenceRow.policy == policy_file.policy_id,
            EvidenceRow.hardware_key == policy_file.hardware.key,
            EvidenceRow.workload_key == policy_file.workload.key,
        )
        .order_by(ActiveRow.tier)
    )
    what = f"a piece of evidence in {where}"
    return [
        tier
        for tier, text in session.execute(query)
        if parse(Evidence, text, what) == policy_file.evidence
    ]


def stored() -> Select[*Stored]:
    """Return the query for all policies with their evidence, the last stored first."""
    return (
        select(
            PolicyRow.digest,
            PolicyRow.schema_version,
            PolicyRow.body,
            HardwareRow.key,
            HardwareRow.body,
            SoftwareRow.key,
            SoftwareRow.body,
            WorkloadRow.key,
            WorkloadRow.body,
            EvidenceRow.body,
        )
        .join(EvidenceRow, EvidenceRow.policy == PolicyRow.digest)
        .join(HardwareRow, HardwareRow.key == EvidenceRow.hardware_key)
        .join(SoftwareRow, SoftwareRow.key == EvidenceRow.software_key)
        .join(WorkloadRow, WorkloadRow.key == EvidenceRow.workload_key)
        .order_by(EvidenceRow.id.desc())
    )


def read(session: Session, query: Select[*Stored], where: str) -> list[PolicyFile]:
    """Return what a query built on `stored` finds, every part checked against its digest.

    Raises:
        CorruptData: A row was changed after it was stored, or is of a newer format.
    """
    return [_policy_file(row, where) for row in session.execute(query)]


def of_transformer(session: Session, transformer_class: str, where: str) -> list[PolicyFile]:
    """Return every policy that was proved for a class of models, the last stored first.

    Raises:
        CorruptData: A row was changed after it was stored, or is of a newer format.
    """
    keys = [
        key
        for key, workload in session.execute(select(WorkloadRow.key, WorkloadRow.body))
        if _workload(key, workload, where).transformer_class == transformer_class
    ]
    return read(session, stored().where(EvidenceRow.workload_key.in_(keys)), where)


def _workload(key: str, workload: str, where: str) -> Workload:
    return parse_addressed(Workload, workload, key, f"a workload in {where}")


def _policy_file(row: Row[*Stored], where: str) -> PolicyFile:
    digest, version, policy, hardware_key, hardware, *rest = row
    software_key, software, workload_key, workload, evidence = rest
    if version != SCHEMA_VERSION:
        raise CorruptData(
            f"{where} has a policy of format {version}, this release reads {SCHEMA_VERSION}: "
            "upgrade ditune"
        )
    return PolicyFile(
        policy_id=digest,
        policy=parse_addressed(Policy, policy, digest, f"a policy in {where}"),
        hardware=parse_addressed(Hardware, hardware, hardware_key, f"a hardware in {where}"),
        software=parse_addressed(Software, software, software_key, f"a software in {where}"),
        workload=_workload(workload_key, workload, where),
        evidence=parse(Evidence, evidence, f"a piece of evidence in {where}"),
    )
