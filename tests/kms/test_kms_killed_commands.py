"""kill -9 at each step of ``hsmwrap keys``: no key is lost, and the command run again finishes.

With ``HSMWRAP_KILLS=N`` in the environment, at each N-th call of the PKCS#11 module as well. There
are more than 4,400, so N = 1 takes hours.
"""

import json
import shutil
from functools import partial

import pytest
from support.faults.shim import fault_shim
from support.kms.killed import NTH_CALL, Command, World
from support.services.softhsm import make_softhsm

pytestmark = pytest.mark.slow

MOVES = (
    Command(("rotate",)),
    Command(("reseal",)),
    Command(("retire", "{old}", "--force"), ends_tokens=True, was_done="has no key"),
)
CLONE = (
    Command(
        ("transport-key", "--out", "transport"),
        "target",
        was_done="is there already",
        writes=("transport",),
    ),
    Command(
        ("export", "--file", "transport", "--fingerprint", "{transport}", "--out", "exported"),
        was_done="is there already",
        writes=("exported",),
    ),
    Command(("import", "--file", "exported", "--fingerprint", "{exported}"), "target"),
)
SHARES = ("share-1", "share-2", "share-3")
BACKUP = (
    Command(
        ("backup", "--shares", "3", "--threshold", "2", "--shares-to", ".", "--out", "kept"),
        was_done="is there already",
        writes=("kept", *SHARES),
    ),
    Command(
        ("restore", "--file", "kept", "--share-file", SHARES[0], "--share-file", SHARES[2]),
        "target",
    ),
)


CLONE_IN_ONE = (
    Command(("clone", "--to", "second.toml", "--to-so-pin-file", "{here}/source/so.pin")),
)


def killed_ones(*chains):
    """Each command of these chains, with those before and after it, and the other HSM tokens."""
    return [
        pytest.param(chain[:at], command, chain[at + 1 :], others, id=command.arguments[0])
        for chain, *others in chains
        for at, command in enumerate(chain)
    ]


def server_file(directory, backend):
    return (
        f'database_url = "sqlite:///{directory}/kms.db"\naudit_file = "{directory}/audit.log"\n'
        f"sweep_interval = 0\n{backend}"
    )


@pytest.fixture(scope="module")
def hsm_world(softhsm, tmp_path_factory):
    """Two tokens that never share a process, and a database."""
    home = tmp_path_factory.mktemp("killed")
    directory = home / "world"
    directory.mkdir()
    shim = fault_shim(softhsm.module, home / "shim")
    tokens = {
        "source": make_softhsm(directory / "source"),
        "target": make_softhsm(directory / "target"),
        "second": make_softhsm(directory / "source", "second"),
    }
    for site, token in tokens.items():
        for name, module in (("killed", str(shim.path)), ("server", token.module)):
            settings = token.bare_settings(module=module)
            lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
            backend = f"[backends.HSM]\nplugin = 'pkcs11'\n[backends.HSM.settings]\n{lines}"
            (directory / f"{site}-{name}.toml").write_text(server_file(directory, backend))
            if name == "killed":
                (directory / f"{site}.toml").write_text(lines)
    sites = {site: token.environment for site, token in tokens.items()}
    world = World(directory, sites, shim)
    world.run(Command(("init",)))
    world.provide()
    return world


@pytest.fixture(scope="module")
def software_world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed") / "world"
    directory.mkdir()
    settings = f"plugin = 'software'\nsettings.keyring_file = '{directory}/keys'\n"
    backend = f"[backends.SOFTWARE]\n{settings}"
    for name in ("killed", "server"):
        (directory / f"source-{name}.toml").write_text(server_file(directory, backend))
    world = World(directory, {"source": {}})
    world.run(Command(("init",)))
    world.provide()
    return world


def kill_at_each_step(world, before, command, after, others):
    """What comes after the command is tried after its last step. Long commands, which do the same
    for each key, are killed at a sample of their steps, unless steps were asked for.
    """
    holds = not any(each.ends_tokens for each in before)
    with world.remembered():
        for each in before:
            world.run(each)
        with world.remembered():
            steps = world.steps_of(command)
        holds = holds and not command.ends_tokens
        tried = steps if NTH_CALL else steps[:: 1 + (len(steps) - 1) // 7]
        for step in tried:
            with world.remembered():
                world.run(command, step)
                world.check(tokens=holds, others=others)
                world.again(command)
                if NTH_CALL or step == tried[-1]:
                    world.check(tokens=holds, others=others)
                if step == tried[-1]:
                    for each in after:
                        world.run(each)
                        holds = holds and not each.ends_tokens
                    world.check(tokens=holds, sites=("source", *others))
    return tried


each_command = partial(pytest.mark.parametrize, ("before", "command", "after", "others"))


@each_command(
    killed_ones((MOVES,), (CLONE, "target"), (CLONE_IN_ONE, "second"), (BACKUP, "target"))
)
def test_an_hsm_command_that_is_killed_loses_nothing(hsm_world, before, command, after, others):
    assert kill_at_each_step(hsm_world, before, command, after, others)


@each_command(killed_ones((MOVES,)))
def test_a_software_command_that_is_killed_loses_nothing(
    software_world, before, command, after, others
):
    assert kill_at_each_step(software_world, before, command, after, others)


# --- a token that is lost, and comes back ---------------------------------------------------------


def test_a_copy_of_the_token_s_directory_brings_everything_back(hsm_world):
    with hsm_world.remembered():
        tokens = hsm_world.directory / "source" / "tokens"
        copy = shutil.copytree(tokens, hsm_world.directory / "copy")
        shutil.rmtree(tokens)
        tokens.mkdir()
        with pytest.raises(AssertionError, match="TokenSelectionError"):
            hsm_world.check(tokens=True)
        shutil.copytree(copy, tokens, dirs_exist_ok=True)
        hsm_world.check(tokens=True)


def test_a_backup_brings_everything_back_on_an_empty_token(hsm_world):
    with hsm_world.remembered():
        back_up, restore = BACKUP
        hsm_world.run(back_up)
        shutil.rmtree(hsm_world.directory / "source")
        with pytest.raises(AssertionError):
            hsm_world.check(tokens=True, sites=["target"])
        hsm_world.run(restore)
        hsm_world.check(tokens=True, sites=["target"])
