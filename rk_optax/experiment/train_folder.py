"""The folder of a training run, which a resumed run goes on writing."""

import json
from pathlib import Path
from typing import Any

from rk_optax.experiment.config import TrainConfig, from_json
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.run_folder import RunFolder


class TrainFolder(RunFolder):
    """A run folder whose metrics can be wound back to a checkpoint."""

    def _forget_unfinished(self) -> None:
        """Leaves the metrics alone until the checkpoint is known that they have to end with."""

    def rewind(self, steps: int | None) -> dict[str, Any] | None:
        """Drops the metrics beyond a checkpoint, with a last line that was cut short.

        Args:
            steps: those of the checkpoint, or None to drop all.

        Returns:
            The metrics at the checkpoint, or None.

        Raises:
            UsageError: if the metrics are damaged before that.
        """
        path = self.path / "metrics.jsonl"
        kept: list[str] = []
        record = None
        if steps is not None:
            for line in path.read_bytes().splitlines(keepends=True):
                record = _parsed(line)
                if record is None:
                    break
                if record["steps"] <= steps:
                    kept.append(line.decode())
                if record["steps"] >= steps:
                    break
            if record is None or record["steps"] != steps:
                raise UsageError(f"{path} is damaged: no metrics of step {steps}, from which the run goes on")
        self._metrics.close()
        self._replace("metrics.jsonl", "".join(kept))
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        return record


def stored_config(path: Path) -> TrainConfig:
    """The configuration of the training run in a folder.

    Raises:
        UsageError: if there is no training run, or its `config.json` is damaged.
    """
    config = path / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} holds no run to resume: start one with --out {path}") from None
    except OSError as error:
        raise UsageError(f"{config}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{config} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("command") != "train":
        raise UsageError(f"{path} holds no run of rk-optax train")
    try:
        return from_json(TrainConfig, content.get("config"))
    except UsageError as error:
        raise UsageError(f"{config} is damaged, or of another version of rk-optax: {error}") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the metrics, or None if it is not whole."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("steps"), int) else None
