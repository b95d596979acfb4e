"""The library with a real store daemon: tensors are its pool."""

from __future__ import annotations

import pytest
import torch

import stoker
from stoker.attach.attachment import Attachment
from stoker.errors import LoadFailed, NotFound, PeerError
from tests.integration.store.daemon import running
from tests.integration.store.origin_server import origin_server
from tests.unit.loader.test_adapters import lora
from tests.unit.loader.tiny_models import logits, tiny_model


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with running(tmp_path_factory.mktemp("store")) as started:
        yield started


@pytest.fixture
def folder(tmp_path):
    stoker.save_model(tiny_model("llama_tied"), tmp_path / "m")
    return tmp_path / "m"


def test_a_model_from_the_pool_is_the_model_from_the_disk(daemon, folder, monkeypatch) -> None:
    attached = []
    monkeypatch.setattr(Attachment, "wait_all", _counting(Attachment.wait_all, attached))
    wanted = stoker.load_model(folder, daemon=None)

    found = stoker.load_model(folder, daemon=daemon.attach_socket)

    assert len(attached) == 1
    assert torch.equal(logits(found), logits(wanted))
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_auto_finds_the_daemon_by_its_variable_and_does_without_it(daemon, folder, monkeypatch) -> None:
    attached = []
    monkeypatch.setattr(Attachment, "wait_all", _counting(Attachment.wait_all, attached))
    monkeypatch.setenv("STOKER_ATTACH_SOCKET", daemon.attach_socket)
    with_daemon = stoker.load_tensors(folder)
    monkeypatch.setenv("STOKER_ATTACH_SOCKET", str(folder / "nobody.sock"))
    without = stoker.load_tensors(folder)

    assert len(attached) == 1
    assert with_daemon.keys() == without.keys()
    assert all(torch.equal(with_daemon[name], tensor) for name, tensor in without.items())


@pytest.mark.parametrize("cause", [PeerError("it hung up"), None], ids=["daemon gone", "load failed"])
def test_auto_goes_on_with_the_disk_only_when_the_daemon_has_gone_away(
    daemon, folder, monkeypatch, cause
) -> None:
    wanted = stoker.load_tensors(folder, daemon=None)
    failed = LoadFailed("the weights did not come")
    failed.__cause__ = cause

    def fail(*_: object, **__: object) -> None:
        raise failed

    monkeypatch.setattr(Attachment, "wait_all", fail)
    monkeypatch.setattr(Attachment, "wait_tensor", fail)
    monkeypatch.setenv("STOKER_ATTACH_SOCKET", daemon.attach_socket)

    with pytest.raises(LoadFailed):
        stoker.load_tensors(folder, daemon=daemon.attach_socket)
    if cause is None:
        with pytest.raises(LoadFailed):
            stoker.load_tensors(folder)
        return
    found = stoker.load_tensors(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with stoker.open(folder) as opened:
        assert torch.equal(opened.get_tensor("model.norm.weight"), wanted["model.norm.weight"])


def test_an_adapter_from_elsewhere_comes_through_the_daemon(daemon, tmp_path) -> None:
    near, far = tiny_model("llama"), tiny_model("llama")
    stoker.load_adapter(near, lora(tmp_path / "poet"))
    with origin_server(tmp_path / "poet") as origin:
        with pytest.raises(PeerError, match="only a store daemon can fetch it"):
            stoker.load_adapter(far, origin.url, daemon=None)
        adapters = stoker.load_adapter(far, origin.url, daemon=daemon.attach_socket)

    assert adapters.names == ("one",)  # as the origin's folder is called
    assert torch.equal(logits(far), logits(near))


def test_an_open_checkpoint_of_a_daemon_gives_tensors_and_slices(daemon, folder) -> None:
    with (
        stoker.open(folder, daemon=daemon.run_dir) as found,
        stoker.open(folder, daemon=None) as wanted,
    ):
        assert found.keys() == wanted.keys()
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(found.get_tensor(name), wanted.get_tensor(name))
        assert torch.equal(found.get_slice(name)[5:7], wanted.get_slice(name)[5:7])


def test_a_daemon_that_was_named_answers_for_itself(daemon, tmp_path) -> None:
    with pytest.raises(NotFound):
        stoker.load_tensors(tmp_path / "nowhere", daemon=daemon.attach_socket)
    with pytest.raises(PeerError):
        stoker.load_tensors(tmp_path, daemon=tmp_path / "nobody.sock")


def _counting(method, calls):
    def counted(self, **options):
        calls.append(self)
        return method(self, **options)

    return counted
