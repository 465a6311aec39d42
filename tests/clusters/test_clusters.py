"""The files in clusters/ are checked without a cluster: by Ray's own validation, by a schema of
KubeRay's resource, by running the Slurm script against stand-ins for Slurm and Ray."""

import copy
import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTERS / name).read_text())


# Files of `ray up`.


def validate_ray_up(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


RAY_UP = ["aws.yaml", "gcp.yaml", "own-machines.yaml"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_file_is_accepted_by_ray(name: str) -> None:
    prepared = validate_ray_up(load(name))
    assert prepared["available_node_types"][prepared["head_node_type"]] is not None


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_file_is_rejected_when_a_key_is_misspelt(name: str) -> None:
    config = load(name)
    config["max_worker"] = config.pop("max_workers")
    with pytest.raises(Exception, match="max_worker"):
        validate_ray_up(config)


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_file_starts_ray_with_token_and_private_dashboard(name: str) -> None:
    config = load(name)
    head = [c for c in config["head_start_ray_commands"] if " start " in c]
    worker = [c for c in config["worker_start_ray_commands"] if " start " in c]
    assert len(head) == len(worker) == 1
    assert all("RAY_AUTH_MODE=token" in command for command in head + worker)
    assert "--dashboard-host=127.0.0.1" in head[0]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head[0]
    assert "--address=$RAY_HEAD_IP:6379" in worker[0] and "--port=6379" in head[0]
    mounts = config["file_mounts"]
    assert [local for remote, local in mounts.items() if remote.endswith(".ray/auth_token")] == [
        "~/.ray/auth_token"
    ]


def test_the_containers_user_may_read_the_token_whatever_number_the_machines_has() -> None:
    """`ray up` copies files onto the machine as its user, and mounts them as they are there."""
    from ray.autoscaler.sdk import get_docker_host_mount_location

    config = load("gcp.yaml")
    (user,) = re.findall(r"--uid (\d+)", (CLUSTERS / "Dockerfile").read_text())
    (remote,) = config["file_mounts"]
    place = get_docker_host_mount_location(config["cluster_name"]) + remote
    (command,) = [c for c in config["initialization_commands"] if "auth_token" in c]
    group, mode = command.split(" && ")
    assert group.split()[:3] == ["sudo", "chgrp", user]
    assert mode.split()[:2] == ["chmod", "640"]
    for pattern in (group.split()[-1], mode.split()[-1]):
        assert fnmatch.fnmatchcase(place, pattern)
    assert f"sudo chown {user} /shared" in config["initialization_commands"]


def test_own_machines_worker_count_is_that_of_the_addresses() -> None:
    config = load("own-machines.yaml")
    prepared = validate_ray_up(config)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"]) == config["min_workers"]


def test_shell_commands_of_ray_up_files_parse() -> None:
    for name in RAY_UP:
        for key, commands in load(name).items():
            for command in commands if key.endswith("_commands") else []:
                done = subprocess.run(["bash", "-n", "-c", command], capture_output=True)
                assert done.returncode == 0, (name, command, done.stderr)


# KubeRay.


def rayjob_schema() -> Any:
    return json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())


def test_rayjob_matches_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(rayjob_schema())
    jsonschema.Draft202012Validator(rayjob_schema()).validate(load("kuberay-rayjob.yaml"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "moesaic"),
        (("spec", "submissionMode"), "K8SJobMode"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "on"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), "2"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), []),
        (("spec", "submitterPodTemplate", "spec", "restartPolicy"), "never"),
    ],
)
def test_rayjob_schema_rejects_a_mistake(path: tuple[str | int, ...], value: Any) -> None:
    job = load("kuberay-rayjob.yaml")
    inner = job
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, rayjob_schema(), cls=jsonschema.Draft202012Validator)


def rayjob_pods() -> list[dict[str, Any]]:
    cluster = load("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_rayjob_is_authenticated_and_unprivileged() -> None:
    cluster = load("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in rayjob_pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_all_pods_of_a_rayjob_are_taken_where_only_restricted_ones_are() -> None:
    """What the Pod Security Standard "restricted" of Kubernetes asks of what the file has."""
    submitter = load("kuberay-rayjob.yaml")["spec"]["submitterPodTemplate"]["spec"]
    # A Kubernetes Job takes no pod that is started again for ever; the command is KubeRay's.
    assert submitter["restartPolicy"] == "Never"
    assert not {"command", "args", "env", "envFrom"} & submitter["containers"][0].keys()
    for pod in [*rayjob_pods(), submitter]:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"] == container["resources"]["requests"]
        kinds = {kind for volume in pod.get("volumes", ()) for kind in volume.keys() - {"name"}}
        assert kinds <= {"persistentVolumeClaim", "emptyDir"}


def test_rayjob_takes_secrets_from_a_secret_alone() -> None:
    for pod in rayjob_pods():
        for container in pod["containers"]:
            assert "env" not in container
            (source,) = container["envFrom"]
            assert source == {"secretRef": {"name": "moesaic-secrets", "optional": True}}


# What all files have in common.

SECRET_WORDS = r"(?i)(token|secret|password|access[_-]?key)\s*[=:]\s*['\"]?[A-Za-z0-9+/]{12,}"


def test_no_file_holds_a_secret() -> None:
    for file in CLUSTERS.iterdir():
        lines = [line for line in file.read_text().splitlines() if re.search(SECRET_WORDS, line)]
        assert not lines, (file, lines)


def test_all_files_agree_on_image_ports_and_the_shared_folder() -> None:
    texts = {file.name: file.read_text() for file in CLUSTERS.iterdir()}
    images = {image for text in texts.values() for image in re.findall(r"\S+/moesaic:\S+", text)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert images == {f"REGISTRY/moesaic:{version}"}
    for name in RAY_UP:
        config = load(name)
        assert "--volume=/shared:/shared" in config.get("docker", {}).get(
            "run_options", ["--volume=/shared:/shared"]
        )
        assert "moesaic run /shared/recipes/mine.yaml --output /shared/runs/mine" in texts[name]
        assert "http://127.0.0.1:8265" in texts[name]
    ports = {port["containerPort"] for c in rayjob_pods()[0]["containers"] for port in c["ports"]}
    assert ports == {6379, 8265}


def test_everything_that_listens_beyond_the_machine_wants_a_token() -> None:
    for name in RAY_UP:
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            for command in load(name)[key]:
                assert " start " not in command or "RAY_AUTH_MODE=token" in command
                assert "0.0.0.0" not in command
    slurm = (CLUSTERS / "slurm.sh").read_text()
    assert "RAY_AUTH_MODE=token" in slurm.partition("symmetric-run --address")[0]
    # The client too, in whatever is shown to be typed.
    for file in CLUSTERS.iterdir():
        text = file.read_text()
        if "ray job submit" in text:
            assert "RAY_AUTH_MODE=token" in text, file


def test_rayjob_pods_mount_volumes_that_exist() -> None:
    for pod in rayjob_pods():
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert mounts == volumes


def test_rayjob_entrypoint_uses_the_shared_volume_and_its_claim_is_the_readmes() -> None:
    words = load("kuberay-rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:2] == ["moesaic", "run"]
    assert all(word.startswith("/shared/") for word in (words[2], words[4]))
    snippet = re.search(r"```yaml\n(.*?)```", (CLUSTERS / "README.md").read_text(), re.S)
    assert snippet
    claim = yaml.safe_load(snippet[1])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in rayjob_pods():
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "emptyDir" not in v]
        assert claims == [{"claimName": claim["metadata"]["name"]}]


# Dockerfile.


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of every instruction, continued lines joined."""
    text = (CLUSTERS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [
        (line.split()[0], line.split(maxsplit=1)[1])
        for line in lines
        if line and not line.startswith("#")
    ]


def test_dockerfile_copies_what_exists_and_the_context_holds() -> None:
    sources = [word for op, rest in dockerfile() if op == "COPY" for word in rest.split()[:-1]]
    assert {"kernels", "methods", "search", "orchestrator", "recipes", "pyproject.toml"} <= {
        *sources
    }
    ignore = (CLUSTERS / "Dockerfile.dockerignore").read_text().splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore


def test_dockerfile_runs_an_installed_command_as_an_ordinary_user() -> None:
    instructions = dockerfile()
    command = [rest for op, rest in instructions if op == "CMD"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert len(command) == 1 and json.loads(command[0])[0] in scripts
    assert [rest for op, rest in instructions if op == "USER"] == ["ray"]
    assert any("RAY_AUTH_MODE=token" in rest for op, rest in instructions if op == "ENV")
    # `ray up` starts the container with a command of its own.
    assert "ENTRYPOINT" not in {op for op, _ in instructions}


def test_dockerfile_finds_the_torch_version_in_the_makefile() -> None:
    expression = re.search(r'"\$\((sed [^)]*)\)"', (CLUSTERS / "Dockerfile").read_text())
    assert expression
    done = subprocess.run(["bash", "-c", expression[1]], cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", done.stdout.strip())


# Slurm.

STANDINS = {
    # Notes what it was asked; on the allocation's nodes it would run the command.
    "srun": """
        echo "srun $*" >> "$LOG"
        while [[ $1 == --* ]]; do shift; done
        if [[ -n ${SRUN_FAILS_AT:-} && $1 == "$SRUN_FAILS_AT" ]]; then exit 9; fi
        "$@"
        if [[ -n ${NODE_FAILS:-} && $1 == ray ]]; then exit 143; fi
        """,
    "scontrol": 'echo "scontrol $*" >> "$LOG"; printf "node7\\nnode8\\n"',
    "hostname": 'echo "192.0.2.7 198.51.100.7 "',
    # What symmetric-run does on the head: the words after `--`.
    "ray": """
        echo "ray $*" >> "$LOG"
        echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE $RAY_TMPDIR" >> "$LOG"
        if [[ -n ${RAY_FAILS:-} ]]; then exit 0; fi
        while [[ $1 != -- ]]; do shift; done
        shift
        "$@"
        """,
    "moesaic": """
        printf "moesaic[%s]" "$@" >> "$LOG"
        echo " at $RAY_ADDRESS" >> "$LOG"
        if [[ -n ${SHELL_ENDS:-} ]]; then kill -KILL $PPID; fi
        if [[ -n ${TERMINATED:-} ]]; then kill -TERM $PPID; sleep 0.2; fi
        exit ${MOESAIC_STATUS:-0}
        """,
}


@pytest.fixture
def submit(tmp_path: Path) -> Any:
    """Runs slurm.sh as sbatch would, with stand-ins; returns the process and what was called."""
    binaries = tmp_path / "checkout" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, body in STANDINS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{body}\n")
        (binaries / name).chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)

    def run(*arguments: str, **extra: str) -> tuple[subprocess.CompletedProcess[str], str]:
        log = tmp_path / "log"
        environment = {
            "PATH": os.environ["PATH"],
            "LOG": str(log),
            "SLURM_SUBMIT_DIR": str(tmp_path / "checkout"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "16",
            **extra,
        }
        command = ["bash", str(CLUSTERS / "slurm.sh"), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return done, log.read_text() if log.exists() else ""

    return run


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "checkout").glob(".moesaic-job-*"))


def test_slurm_script_runs_the_recipe_on_the_head_of_all_nodes(submit: Any, tmp_path: Path) -> None:
    done, log = submit("my recipe.yaml", "--output", "runs/x", SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    assert "scontrol show hostnames node[7-8]" in log
    assert "srun --nodes=1 --ntasks=1 --nodelist=node7 hostname --all-ip-addresses" in log
    assert (
        "srun --no-kill --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16 ray symm" in log
    )
    assert (
        "ray symmetric-run --address 192.0.2.7:23456 --min-nodes 2 --num-cpus 16 --num-gpus 8 -- "
        in log
    )
    assert "token 64 token /tmp/ray-123456" in log
    last = "srun --no-kill --nodes=2 --ntasks=2 --ntasks-per-node=1 rm -rf /tmp/ray-123456\n"
    assert log.endswith(last)
    arguments = "moesaic[run]moesaic[my recipe.yaml]moesaic[--output]moesaic[runs/x]"
    assert f"{arguments} at 192.0.2.7:23456" in log
    assert leftovers(tmp_path) == []


def test_slurm_script_keeps_the_token_off_command_lines(submit: Any) -> None:
    _, log = submit("recipe.yaml")
    assert not re.search(r"[0-9a-f]{32}", log)


def test_slurm_script_takes_the_given_address_and_no_gpus_by_default(submit: Any) -> None:
    done, log = submit("recipe.yaml", HEAD_ADDRESS="203.0.113.1")
    assert done.returncode == 0, done.stderr
    assert "hostname" not in log.replace("show hostnames", "")
    assert "--address 203.0.113.1:23456" in log and "--num-gpus 0 --" in log


def test_slurm_script_fails_when_the_run_fails(submit: Any, tmp_path: Path) -> None:
    done, log = submit("recipe.yaml", MOESAIC_STATUS="3")
    assert done.returncode == 3
    assert "rm -rf" not in log
    assert leftovers(tmp_path) == []


def test_slurm_script_fails_when_ray_does_not_start_but_says_nothing(
    submit: Any, tmp_path: Path
) -> None:
    done, _ = submit("recipe.yaml", RAY_FAILS="1")
    assert done.returncode == 1
    assert "Ray did not start on node7 (192.0.2.7:23456)" in done.stderr
    assert leftovers(tmp_path) == []


def test_slurm_script_succeeds_when_only_a_node_failed(submit: Any, tmp_path: Path) -> None:
    """srun fails then, and cannot have as many nodes for the tidying up."""
    done, _ = submit("recipe.yaml", NODE_FAILS="1", SRUN_FAILS_AT="rm")
    assert done.returncode == 0
    assert "the run is done" in done.stderr and "/tmp/ray-123456 stays on the nodes" in done.stderr
    done, _ = submit("recipe.yaml", NODE_FAILS="1", MOESAIC_STATUS="2")
    assert done.returncode == 2
    assert leftovers(tmp_path) == []


def test_slurm_script_fails_when_the_run_does_not_end_by_itself(
    submit: Any, tmp_path: Path
) -> None:
    done, log = submit("recipe.yaml", SHELL_ENDS="1")
    assert done.returncode == 137 and "rm -rf" not in log
    assert "the run on node7 was ended from outside; finished work is kept" in done.stderr
    assert leftovers(tmp_path) == []


def test_slurm_script_passes_on_how_a_run_that_was_told_to_stop_ended(submit: Any) -> None:
    done, _ = submit("recipe.yaml", TERMINATED="1", MOESAIC_STATUS="1")
    assert done.returncode == 1 and "outside" not in done.stderr


def test_slurm_job_outlives_a_node_that_fails() -> None:
    assert "\n#SBATCH --no-kill\n" in (CLUSTERS / "slurm.sh").read_text()


def test_slurm_script_exits_2_when_called_wrongly(submit: Any, tmp_path: Path) -> None:
    done, log = submit()
    assert (done.returncode, log) == (2, "") and "usage:" in done.stderr
    done, log = submit("recipe.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, log) == (2, "") and "make install" in done.stderr


def test_slurm_directives_stand_before_the_first_command() -> None:
    # sbatch reads no further than the first line that is neither empty nor a comment.
    lines = (CLUSTERS / "slurm.sh").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives and max(directives) < first


def test_readme_names_every_file_and_only_those() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (CLUSTERS / "README.md").read_text())
    linked = {link for link in links if not link.startswith("../")}
    present = {path.name for path in CLUSTERS.iterdir()} - {"README.md", "Dockerfile.dockerignore"}
    assert linked == present
    for link in set(links) - linked:
        assert (CLUSTERS / link.partition("#")[0]).is_file(), link
