"""Writes and uploads the repository of a head: PEFT adapter, quality head, recommended settings, model card."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelCard

from . import adapters, heads
from .adapter_files import CONFIG, WEIGHTS, write_adapter
from .files import is_hub_id
from .fingerprints import portable_fingerprint, weights_fingerprint
from .model_card import adapter_card, method, model_card, pipeline_card

FACTS = {"call", "dataset", "command", "hardware", "license", "steps", "versions", "metrics", "figure"}
FACTS |= {"target", "states", "detection"}


def save_head_repo(
    pipe: Any,
    folder: str | Path,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    facts: dict[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the head of a pipeline, its LoRA adapter and its scheduler settings as a repository of their own.

    Files: adapter_config.json and adapter_model.safetensors if the head has an adapter, quality_head/, scheduler/ and
    README.md. The base model is named, not copied.

    Args:
        pipe: `PrismPipeline` with a quality head.
        folder: where; made if missing. Files of the same names are replaced.
        base_model: Hub id or folder that the head belongs to; None for the one in the head's config.
        base_revision: revision of the base model; None for the one in the head's config.
        facts: about the training, for the card. All are optional: "dataset", "command", "hardware", "license"
            (strings), "steps" (int), "versions" and "metrics" (dicts), "call" (dict, arguments of the pipeline that fit
            the training data), "figure" (path of a calibration plot, which is copied); "target", "states" and
            "detection": what the head estimates, what it learned on, and what it finds (strings, Markdown).
        repo_id: where it will be on the Hub, for the card; None for a folder.
    Returns:
        The folder.
    Raises:
        ValueError: no quality head; no base model is known, or the one known is not the model in use; an unknown fact.
    Warns:
        UserWarning: the scheduler, which is saved as the recommended one, does not read the head; or other adapters are
            active, which are not saved.
    """
    if pipe.quality_head is None:
        raise ValueError("This pipeline has no quality head to save. Load or train one, or save the whole pipeline.")
    facts, folder, named = facts or {}, Path(folder), base_model
    base_model = base_model or pipe.quality_head.config.base_model
    base_revision = base_revision or pipe.quality_head.config.base_revision
    if not base_model:
        raise ValueError(
            "No base model is known for this head: pass `base_model` (the Hub id of its backbone). A head that was "
            'tuned together with its backbone works with that backbone only: push_to_hub(repo_id, what="pipeline").'
        )
    if unknown := sorted(set(facts) - FACTS):
        raise ValueError(f"`facts` has unknown entries {unknown}; known: {sorted(FACTS)}.")
    heads.check_scheduler(pipe.scheduler)
    if not pipe.scheduler.needs_quality:
        warnings.warn(
            f"{type(pipe.scheduler).__name__} does not read the quality head, and is saved as recommended with it. "
            "Set pipe.scheduler to the one that users should have, such as PrismScheduler.",
            stacklevel=2,
        )
    mine = pipe._head_adapter()
    if others := [name for name in adapters.active_adapters(pipe.model) if name != mine]:
        warnings.warn(
            f"The adapters {others} are in use and are not part of the head's repository, so whoever loads the head "
            'gets another model. Save or push the whole pipeline (what="pipeline"), or switch them off first.',
            stacklevel=2,
        )
    check_base(pipe, named)
    folder.mkdir(parents=True, exist_ok=True)
    rank = save_adapter(pipe, folder, base_model, base_revision)
    pipe.quality_head.save_pretrained(folder / "quality_head", safe_serialization=True)
    belongs = {"base_model": base_model, "base_revision": base_revision, "mdm_spec": dict(pipe.config.mdm_spec)}
    rewrite(folder / "quality_head" / "config.json", belongs | heads.fingerprints(pipe.model))
    pipe.scheduler.save_pretrained(folder / "scheduler")
    rewrite(folder / "scheduler" / "scheduler_config.json", {})
    write_card(folder, model_card(pipe, base_model, base_revision, rank, facts, repo_id), facts)
    return folder


def check_base(pipe: Any, named: str | None) -> None:
    """Raise a ValueError if a head's base model is not the model in use and the caller did not name the base."""
    trained_with = pipe.quality_head.config.weights_fingerprint
    origin, here = getattr(pipe.model, "_origin", None), weights_fingerprint(pipe.model)
    comparable = trained_with and portable_fingerprint(pipe.model)
    if named is None and ((origin and origin.fingerprint != here) or (comparable and trained_with != here)):
        raise ValueError(
            f"The head names the base model {pipe.quality_head.config.base_model!r}, and the model in use has other "
            'weights. Save or push the whole pipeline (what="pipeline"), or pass `base_model`, '
            "the Hub id of the weights in use."
        )


def write_card(folder: Path, card: ModelCard, facts: dict[str, Any]) -> None:
    """Write README.md, and copy the plot that it shows."""
    figure = facts.get("figure")
    if figure and Path(figure).resolve() != (folder / "calibration.png").resolve():
        shutil.copyfile(figure, folder / "calibration.png")
    card.save(folder / "README.md")


def save_adapter(pipe: Any, folder: Path, base_model: str, base_revision: str | None) -> int | None:
    """Write the adapter of the head in use as PEFT does, and return its rank; None without an adapter."""
    name = pipe._head_adapter()
    if name is None:
        for file in (CONFIG, WEIGHTS):
            (folder / file).unlink(missing_ok=True)
        return None
    write_adapter(pipe.model, name, folder, base_model, base_revision)
    return pipe.model.peft_config[name].r


def rewrite(file: Path, values: dict[str, Any]) -> None:
    """Set fields of a JSON file, and drop the folder that it was loaded from."""
    content = json.loads(file.read_text())
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content | values, indent=2, sort_keys=True) + "\n")


def scrub(file: Path, base_model: str | None) -> None:
    """Remove folders of this machine from a JSON file of a saved pipeline; a base model is named by its Hub id."""
    content = json.loads(file.read_text())
    named = [key for key in ("_name_or_path", "name_or_path") if key in content]
    based = [key for key in ("base_model", "base_model_name_or_path") if content.get(key)]
    values = {key: base_model for key in based if not is_hub_id(content[key])}
    if named or values:
        content = {key: value for key, value in content.items() if key not in named} | values
        file.write_text(json.dumps(content, indent=2) + "\n")


class Commit(NamedTuple):
    """Where something is uploaded to.

    Args:
        repo_id: "owner/name" on the Hub; made if missing.
        private: whether a new repository is private; None for the Hub's default.
        token: access token of the Hub; None for the one that is logged in.
        revision: branch to commit to; None for main.
        message: of the commit; None for a default.
    """

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    message: str | None = None


def push_head_repo(
    pipe: Any,
    commit: Commit,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    facts: dict[str, Any] | None = None,
) -> str:
    """Upload what `save_head_repo` writes.

    Args:
        pipe, base_model, base_revision, facts: as `save_head_repo`. `base_model` must be an id on the Hub, because
            users of the head need it.
        commit: where to.
    Returns:
        URL of the commit.
    Raises:
        ValueError: the base model is a folder here, or what `save_head_repo` raises.
    """
    base_model = base_model or (pipe.quality_head and pipe.quality_head.config.base_model)
    if base_model and not is_hub_id(base_model):
        raise ValueError(
            f"The base model of this head is {base_model!r}, which is not an id on the Hub (owner/name), so "
            "others could not load it. Push the base model first, and pass its id as `base_model`."
        )
    with tempfile.TemporaryDirectory() as temporary:
        save_head_repo(
            pipe, temporary, base_model=base_model, base_revision=base_revision, facts=facts, repo_id=commit.repo_id
        )
        replaces = ["adapter_*", "quality_head/*", "scheduler/*"]
        return upload(Path(temporary), commit, replaces, f"{method(pipe)} quality head")


def save_adapter_repo(
    pipe: Any,
    name: str,
    folder: str | Path,
    base_model: str,
    base_revision: str | None = None,
    facts: dict[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write one adapter of a pipeline's model as a plain PEFT adapter, which `PeftModel.from_pretrained` loads.

    Args:
        pipe: `PrismPipeline`.
        name: of the adapter in its model.
        folder, base_model, base_revision, facts, repo_id: as `save_head_repo`.
    Returns:
        The folder.
    """
    folder, facts = Path(folder), facts or {}
    write_adapter(pipe.model, name, folder, base_model, base_revision)
    rank = pipe.model.peft_config[name].r
    write_card(folder, adapter_card(pipe, base_model, base_revision, rank, facts, repo_id), facts)
    return folder


def push_adapter_repo(
    pipe: Any,
    name: str,
    commit: Commit,
    *,
    base_model: str,
    base_revision: str | None = None,
    facts: dict[str, Any] | None = None,
) -> str:
    """Upload what `save_adapter_repo` writes, and return the URL of the commit; arguments as `push_head_repo`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_adapter_repo(pipe, name, folder, base_model, base_revision, facts, commit.repo_id)
        return upload(folder, commit, ["adapter_*"], "LoRA adapter")


def push_pipeline(
    pipe: Any, commit: Commit, *, base_model: str | None = None, facts: dict[str, Any] | None = None
) -> str:
    """Upload a whole saved pipeline; arguments as `push_head_repo`.

    A pipeline with an adapter names its base model, as a head's repository does.

    Raises:
        ValueError: it has an adapter, and the base model is a folder of this machine.
    """
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary)
        if not (Path(temporary) / "model" / "config.json").exists():
            base_model = base_model or (pipe.quality_head and pipe.quality_head.config.base_model)
            if not base_model or not is_hub_id(base_model):
                raise ValueError(
                    f"This pipeline has a LoRA adapter, and its base model {base_model!r} is not an id on the Hub. "
                    "Pass `base_model`, or merge the adapter into the weights first: pipe.fuse_lora()."
                )
        if pipe.quality_head is not None:
            # A tuned backbone gets a new name now. Its fingerprints show that the head belongs to it.
            rewrite(Path(temporary) / "quality_head" / "config.json", heads.fingerprints(pipe.model))
        for file in Path(temporary).rglob("*.json"):
            scrub(file, base_model)
        write_card(Path(temporary), pipeline_card(pipe, base_model, facts or {}, commit.repo_id), facts or {})
        replaces = ["model/*", "quality_head/*", "scheduler/*", "tokenizer/*"]
        return upload(Path(temporary), commit, replaces, "PRISM pipeline")


def upload(folder: Path, commit: Commit, replaces: list[str], default_message: str) -> str:
    """Make a repository if there is none, and commit a folder to it; returns the commit's URL.

    Files of the repository that match a pattern of `replaces` and are not in the folder are deleted, so that no old
    adapter is loaded.
    """
    api = HfApi(token=commit.token)
    repo_id = api.create_repo(commit.repo_id, private=commit.private, exist_ok=True).repo_id
    if commit.revision is not None:
        api.create_branch(repo_id, branch=commit.revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=commit.revision,
        commit_message=commit.message or default_message,
        delete_patterns=replaces,
    ).commit_url
