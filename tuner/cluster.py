"""Starting workers as jobs of a cluster: submitit hands one command to SLURM, or runs it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ditune.db.errors import UsageFault


def submit(
    command: Sequence[str],
    count: int,
    folder: Path,
    settings: Mapping[str, str | int],
    cluster: str = "slurm",
) -> list[Any]:
    """Submit the same command as several jobs of a cluster.

    What submitit pickles for its job is the command, a list of words, and nothing of ours.

    Args:
        command: What each job runs; it has to exist on the machines of the cluster.
        count: How many jobs.
        folder: Takes logs; on a file system that the machines share.
        settings: Of SLURM, such as "partition", "gpus_per_node" or "time" (minutes).
        cluster: "slurm", or "local" for processes of this machine.

    Returns:
        submitit's jobs, each with its `job_id`.

    Raises:
        UsageFault: submitit is not installed, there is no SLURM, or it refuses a setting.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise UsageFault(
            "submitting workers needs the package submitit: pip install 'ditune[slurm]'"
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        named = {f"slurm_{name}": value for name, value in settings.items()}
        executor.update_parameters(name="ditune-worker", **named)
        run = submitit.helpers.CommandFunction(list(command), verbose=False)
        with executor.batch():
            return [executor.submit(run) for _ in range(count)]
    except (RuntimeError, NameError, submitit.core.utils.FailedJobError) as fault:
        first = str(fault).strip().partition("\n")[0]
        raise UsageFault(f"{cluster} does not take the workers: {first}") from fault
