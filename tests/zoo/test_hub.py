"""Downloads with the real Hub client, from a server of our own, with everything that goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, Repo

import qzoo
from qzoo.config import WEIGHTS
from qzoo.errors import CheckpointError, HubError, UnknownModelError
from qzoo.zoo import hub

NAME, REPO = "resnet20.fmnist-w8a8", "org/resnet20.fmnist-w8a8"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = qzoo.create_model(NAME)
    qzoo.calibrate(model, [torch.randn(4, 1, 28, 28)], progress=False)
    return qzoo.save_pretrained(model, tmp_path_factory.mktemp("checkpoint") / NAME)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, a client that knows no other, and an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client's pauses between attempts
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecretOfTheTests")
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "no_embedded_checkpoints")
    yield served
    served.close()


@pytest.fixture
def repo(server: Hub, checkpoint: Path) -> Repo:
    repo = server.repos[REPO] = Repo()
    repo.commit({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    return repo


def same(model: torch.nn.Module, folder: Path) -> bool:
    x = torch.randn(2, 1, 28, 28)
    return torch.equal(model(x), qzoo.load_pretrained(folder)(x))


def partial_files(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix == ".safetensors"]


# ---- what works ----


def test_a_repository_loads_and_the_second_time_from_the_cache(
    server: Hub, repo: Repo, checkpoint: Path
) -> None:
    assert same(qzoo.load_pretrained(REPO), checkpoint)
    gets = len(server.requests("GET"))
    assert same(qzoo.load_pretrained(REPO), checkpoint)
    assert len(server.requests("GET")) == gets


def test_only_the_needed_files_are_fetched(server: Hub, repo: Repo) -> None:
    repo.commit({"onnx/model_int8.onnx": bytes(1000), "extra.bin": bytes(1000)})
    qzoo.load_pretrained(REPO)
    assert {line.rsplit("/", 1)[1] for line in server.requests("resolve")} == {"config.json", WEIGHTS}


def test_revisions(server: Hub, repo: Repo, checkpoint: Path) -> None:
    first = repo.refs["main"]
    repo.refs["v1"] = first
    repo.commit({"config.json": b"{}"})
    assert same(qzoo.load_pretrained(REPO, revision=first), checkpoint)
    assert same(qzoo.load_pretrained(REPO, revision="v1"), checkpoint)
    with pytest.raises(CheckpointError, match="format_version"):
        qzoo.load_pretrained(REPO)
    with pytest.raises(HubError, match="no such revision"):
        qzoo.load_pretrained(REPO, revision="v2")


def pin(monkeypatch: pytest.MonkeyPatch, repo: Repo, **changes: str) -> None:
    commit = repo.refs["main"]
    digest = hashlib.sha256(repo.commits[commit]["config.json"]).hexdigest()
    values = {"repo": REPO, "revision": commit, "sha256": digest, **changes}
    monkeypatch.setattr(hub, "pins", lambda: {NAME: hub.Pin(**values)})


def test_names_load_from_their_pin_whatever_the_repository_becomes(
    server: Hub, repo: Repo, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, repo)
    repo.commit({"config.json": b"{}", WEIGHTS: b""})
    assert same(qzoo.create_model(NAME, pretrained=True), checkpoint)
    assert NAME in qzoo.list_models("resnet20", pretrained=True)
    before = len(server.log)
    assert same(qzoo.resnet20(pretrained=True, quantize=True), checkpoint)
    assert len(server.log) == before  # a commit is in the cache for good: not even a question
    with pytest.raises(ValueError, match="no revisions"):
        qzoo.load_pretrained(NAME, revision="main")


def test_pin_that_does_not_match_is_refused(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, repo, sha256="0" * 64)
    with pytest.raises(HubError, match="SHA-256"):
        qzoo.create_model(NAME, pretrained=True)


def test_repository_of_another_checkpoint(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, repo)
    misnamed = {"resnet20.fmnist-w4a8": hub.pins()[NAME]}
    monkeypatch.setattr(hub, "pins", lambda: misnamed)
    with pytest.raises(CheckpointError, match=r"holds 'resnet20.fmnist-w8a8', not 'resnet20.fmnist-w4a8'"):
        qzoo.create_model("resnet20.fmnist-w4a8", pretrained=True)


def test_offline_uses_the_cache_and_says_what_is_missing(
    server: Hub, repo: Repo, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"not in the cache.*HF_HUB_OFFLINE"):
        qzoo.load_pretrained(REPO)
    assert server.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    qzoo.load_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.log)
    assert same(qzoo.load_pretrained(REPO), checkpoint)
    assert len(server.log) == before


# ---- what goes wrong ----


def test_no_network_is_said_at_once(tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with pytest.raises(HubError, match="no network"):
        hub.download(REPO)


def test_missing_gated_and_private_repositories(server: Hub, repo: Repo) -> None:
    with pytest.raises(HubError, match="no such repository"):
        qzoo.load_pretrained("org/nothing")
    repo.gated = True
    with pytest.raises(HubError, match="gated"):
        qzoo.load_pretrained(REPO)
    repo.gated, repo.private = False, True
    assert qzoo.load_pretrained(REPO) is not None  # HF_TOKEN is sent
    del repo.commits[repo.refs["main"]][WEIGHTS]
    server.log.clear()
    with pytest.raises(HubError, match="no such file"):
        hub.fetch(REPO, "other.safetensors")


@pytest.mark.parametrize("kind", ["drop", "truncate", "500", "503", "429", "slow"])
@pytest.mark.parametrize("place", ["GET /lfs/", "GET .*config.json"])
def test_passing_faults_are_survived_or_said_and_the_next_try_works(
    server: Hub, repo: Repo, checkpoint: Path, kind: str, place: str
) -> None:
    server.fault(place, kind)
    try:
        model = qzoo.load_pretrained(REPO)
    except HubError:
        model = qzoo.load_pretrained(REPO)
    assert same(model, checkpoint)


@pytest.mark.parametrize("kind", ["drop", "500", "503", "429"])
def test_lasting_faults_are_errors_that_say_so(server: Hub, repo: Repo, kind: str) -> None:
    server.fault(".", kind, times=1000)
    with pytest.raises(HubError) as error:
        qzoo.load_pretrained(REPO)
    assert "org/resnet20.fmnist-w8a8" in str(error.value)
    assert "Secret" not in str(error.value)


def test_wrong_content_is_thrown_away_and_never_loaded(
    server: Hub, repo: Repo, checkpoint: Path, tmp_path: Path
) -> None:
    server.fault("GET /lfs/", "wrong")
    with pytest.raises(HubError, match=r"SHA-256.*has been removed"):
        qzoo.load_pretrained(REPO)
    assert partial_files(tmp_path) == []
    assert same(qzoo.load_pretrained(REPO), checkpoint)


def test_a_broken_download_resumes(
    server: Hub, repo: Repo, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is written at a time
    server.fault("GET /lfs/", "truncate")
    try:
        model = qzoo.load_pretrained(REPO)
    except HubError:
        model = qzoo.load_pretrained(REPO)
    assert same(model, checkpoint)
    assert any("bytes=" in line for line in server.requests("GET /lfs/"))


def test_a_file_damaged_in_the_cache_is_found_out(
    server: Hub, repo: Repo, checkpoint: Path, tmp_path: Path
) -> None:
    folder = hub.download(REPO)
    (folder / WEIGHTS).resolve().write_bytes(b"rubbish")
    with pytest.raises(HubError, match=r"damaged in the cache and has been removed"):
        qzoo.load_pretrained(REPO, local_files_only=True)
    with pytest.raises(HubError, match="not in the cache"):
        qzoo.load_pretrained(REPO, local_files_only=True)
    assert same(qzoo.load_pretrained(REPO), checkpoint)
    (folder / WEIGHTS).resolve().write_bytes(b"rubbish")
    assert same(qzoo.load_pretrained(REPO), checkpoint)


def test_a_config_damaged_in_the_cache_is_fetched_anew(server: Hub, repo: Repo, checkpoint: Path) -> None:
    """By a bit that leaves it valid, by truncation, and where a link leads nowhere."""
    config = hub.download(REPO) / "config.json"
    content = config.read_bytes()
    damages = [
        lambda: config.resolve().write_bytes(content.replace(b"fashion-mnist", b"fashion-mnisu")),
        lambda: config.resolve().write_bytes(content[:100]),
        lambda: config.resolve().write_bytes(b""),
        lambda: config.resolve().unlink(),
    ]
    for revision in ("main", repo.refs["main"]):
        for damage in damages:
            damage()
            assert same(qzoo.load_pretrained(REPO, revision=revision), checkpoint)
            assert config.read_bytes() == content
    damages[0]()
    with pytest.raises(HubError, match="damaged in the cache and has been removed; go online"):
        qzoo.load_pretrained(REPO, local_files_only=True)


def test_a_damaged_file_that_can_not_be_removed_is_named(
    server: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.download(REPO)
    (folder / WEIGHTS).resolve().write_bytes(b"rubbish")

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(HubError, match=rf"{WEIGHTS} is damaged and can't be removed.*remove it by hand"):
        qzoo.load_pretrained(REPO)


# ---- hostile servers ----


def cache_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_huge_config_is_refused_before_it_is_downloaded(server: Hub, repo: Repo, tmp_path: Path) -> None:
    repo.commit({"config.json": bytes(2 << 20)})
    with pytest.raises(HubError, match=r"offers 2097152 bytes; this file may have 1048576 at most"):
        qzoo.load_pretrained(REPO)
    assert server.requests("GET .*config.json") == []
    assert cache_bytes(tmp_path) == 0


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_an_answer_without_end_is_cut_off(server: Hub, repo: Repo, tmp_path: Path, file: str) -> None:
    server.fault("GET .*config.json" if file == "config.json" else "GET /lfs/", "endless", times=100)
    with pytest.raises(HubError, match="the server sent more than"):
        qzoo.load_pretrained(REPO)
    assert cache_bytes(tmp_path) < 1 << 20


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../../../outside"'},
        {"X-Linked-ETag": '"../../../../../outside"'},
        {"ETag": '"/tmp/outside"'},
        {"ETag": '".."'},
        {"X-Repo-Commit": "../../../../outside"},
        {"X-Repo-Commit": "/tmp/outside"},
        {"X-Repo-Commit": "main"},
    ],
    ids=str,
)
def test_answers_that_name_places_outside_of_the_cache_are_refused(
    server: Hub, repo: Repo, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.headers = headers
    with pytest.raises(HubError, match="answer is none of a Hub's"):
        qzoo.load_pretrained(REPO)
    assert [path for path in tmp_path.rglob("*outside*") if "test_answers" not in path.name] == []
    assert server.requests("GET") == []


def test_the_token_does_not_go_where_a_refresh_route_points(
    server: Hub, repo: Repo, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    other = Hub()
    server.headers = {
        "X-Xet-Hash": "0" * 64,
        "X-Xet-Refresh-Route": f"{other.url}/refresh",
        "Link": f'<{other.url}/refresh>; rel="xet-auth"',
    }
    assert same(qzoo.load_pretrained(REPO), checkpoint)
    assert other.log == []
    other.close()


@pytest.mark.parametrize("token", ["hf_first\nhf_second", "secret value", "", "geheim\u00e9"])
def test_a_token_that_no_request_can_carry_is_refused_and_not_repeated(server: Hub, token: str) -> None:
    with pytest.raises(ValueError, match="the token is empty or holds") as error:
        qzoo.load_pretrained(REPO, token=token)
    text = "".join(traceback.format_exception(error.value))
    assert not any(part in text for part in token.split() if part != "value")


def test_a_traceback_shows_no_token(server: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client's own errors quote, and where the token is not of the usual form."""
    monkeypatch.setenv("HF_TOKEN", "geheim\u00e9sToken")
    for action in (
        lambda: qzoo.load_pretrained(REPO),
        lambda: qzoo.push_to_hub(qzoo.create_model("resnet20.fmnist"), "org/new"),
    ):
        with pytest.raises(HubError) as error:
            action()
        link: BaseException | None = error.value
        while link is not None:
            assert "geheim" not in "".join(traceback.format_exception(link))
            link = link.__cause__ or link.__context__


def test_full_disk(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(HubError, match=r"disk is full.*HF_HOME"):
        qzoo.load_pretrained(REPO)


def test_repositories_of_other_kinds(server: Hub, repo: Repo) -> None:
    server.repos["org/other"] = Repo()
    server.repos["org/other"].commit({"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(CheckpointError, match="no format_version; this is no checkpoint of qzoo"):
        qzoo.load_pretrained("org/other")
    values = json.loads(repo.commits[repo.refs["main"]]["config.json"])
    rubbish = b"this is no safetensors file"
    values["files"] = {WEIGHTS: hashlib.sha256(rubbish).hexdigest()}
    values["sizes"] = {WEIGHTS: len(rubbish)}
    repo.commit({"config.json": json.dumps(values).encode(), WEIGHTS: rubbish})
    with pytest.raises(CheckpointError, match="no whole safetensors"):
        qzoo.load_pretrained(REPO)
    repo.commit({"config.json": json.dumps(values | {"files": {}}).encode()})
    with pytest.raises(CheckpointError, match="recipe without weights"):
        qzoo.load_pretrained(REPO)


def test_names_that_are_nothing(server: Hub) -> None:
    with pytest.raises(UnknownModelError, match=r"no checkpoint 'resnet18.tv_in1k-w8a8'"):
        qzoo.load_pretrained("resnet18.tv_in1k-w8a8")
    with pytest.raises(CheckpointError, match="no folder"):
        qzoo.load_pretrained("/nowhere/at/all")
    assert server.log == []


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(server: Hub, repo: Repo) -> None:
    qzoo.load_pretrained(REPO)
    assert server.requests("GET /lfs/")
    assert any("config.json" in line for line in server.authorization)
    assert not any("/lfs/" in line for line in server.authorization)


def test_tokens_are_never_repeated() -> None:
    assert hub.redact("Bearer hf_abcdefgh and hf_abcdefgh!") == "[token] and [token]!"


def test_two_processes_at_once_both_get_it_whole(server: Hub, repo: Repo, tmp_path: Path) -> None:
    server.fault("GET /lfs/", "slow", times=2)
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    code = f"import qzoo; print(qzoo.load_pretrained({REPO!r}).qzoo_config.name)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == [NAME, NAME]
    assert list((tmp_path / "home" / "hub").rglob(WEIGHTS))  # HF_HOME is where the cache is
