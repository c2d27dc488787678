"""The manifests: right by the schemas that Kubernetes publishes, and in agreement with each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from relays import ROOT, run_relay

from relay.config.load import loads

PLACE = ROOT / "deploy" / "kubernetes"
VERSION = "1.29"  # of the schemas: what was new then is not used
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet")


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every manifest that kustomize applies."""
    listed = yaml.safe_load((PLACE / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(
        path.name for path in PLACE.glob("*.yaml") if path.name != "kustomization.yaml"
    )
    for name in listed:
        for found in yaml.safe_load_all((PLACE / name).read_text()):
            yield f"{name}:{found['kind']}/{found['metadata']['name']}", found


FOUND = dict(documents())


def of(*kinds: str) -> dict[str, dict[str, Any]]:
    """The manifests of these kinds, by name."""
    return {found["metadata"]["name"]: found for found in FOUND.values() if found["kind"] in kinds}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    """The pods that it makes."""
    made: dict[str, Any] = workload["spec"]["template"]
    return made


CONFIGS: dict[str, str] = of("ConfigMap")["relay"]["data"]


@pytest.mark.parametrize("name", FOUND)
def test_a_manifest_is_what_kubernetes_takes(name: str) -> None:
    """Every key and type is in the published schema, and no other is."""
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is missing: pip install it"
    )
    validate.validate(FOUND[name], VERSION, strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_in_the_map_is_right(name: str, tmp_path: Path) -> None:
    """relay check takes it."""
    path = tmp_path / name
    path.write_text(CONFIGS[name])
    done = run_relay("check", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_there_is_one_of_each_that_a_tree_needs() -> None:
    """A root, branches with names and volumes of their own, one on every node, and a budget for disruptions."""
    assert {name: found["kind"] for name, found in of(*WORKLOADS).items()} == {
        "relay-root": "Deployment",
        "relay-middle": "StatefulSet",
        "relay-node": "DaemonSet",
    }
    assert set(of("PodDisruptionBudget")) == {"relay-middle"}
    headless = {name for name, found in of("Service").items() if found["spec"].get("clusterIP") == "None"}
    assert headless == {"relay-middle", "relay-live"}


@pytest.mark.parametrize("name", of(*WORKLOADS))
def test_a_pod_has_nothing_but_what_it_needs(name: str) -> None:
    """Not root, nothing writable but its volumes, no capability, no token, limits and probes."""
    spec = pod(of(*WORKLOADS)[name])["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    (box,) = spec["containers"]
    assert box["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert box["resources"]["limits"]["memory"]
    assert box["startupProbe"]["exec"]["command"][0] == "relay"
    assert box["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert box["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("name", of(*WORKLOADS))
def test_a_pod_fits_its_configuration(name: str) -> None:
    """The file is in the map, its ports are those of the container, and it may drain before it is killed."""
    spec = pod(of(*WORKLOADS)[name])["spec"]
    (box,) = spec["containers"]
    command, path = box["args"]
    assert command == "serve"
    config = loads(CONFIGS[Path(path).name])
    mounts = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    claims = {
        claim["metadata"]["name"] for claim in of(*WORKLOADS)[name]["spec"].get("volumeClaimTemplates", ())
    }
    assert volumes[mounts[str(Path(path).parent)]]["configMap"]["name"] in of("ConfigMap")
    assert set(mounts.values()) == set(volumes) | claims
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim")
        assert claim is None or claim["claimName"] in of("PersistentVolumeClaim")
    listening = {route.source.listen.port for route in config.routes.values() if route.source.listen}
    listening |= {
        sink.listen.port for route in config.routes.values() for _, sink in route.sinks() if sink.listen
    }
    assert config.admin is not None
    assert config.admin.http is not None
    assert {port["containerPort"] for port in box["ports"]} == listening | {config.admin.http.port}
    assert config.drain < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", of("Service", "PodDisruptionBudget"))
def test_what_selects_pods_selects_those_of_one_workload(name: str) -> None:
    """Selectors are labels that pods have, ports are names that their containers have."""
    for kind in ("Service", "PodDisruptionBudget"):
        found = of(kind).get(name)
        if found is None:
            continue
        selector = found["spec"]["selector"].get("matchLabels", found["spec"]["selector"])
        (chosen,) = [
            workload
            for workload in of(*WORKLOADS).values()
            if selector.items() <= pod(workload)["metadata"]["labels"].items()
        ]
        ports = {port["name"] for port in pod(chosen)["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in found["spec"].get("ports", ())} <= ports
    for workload in of(*WORKLOADS).values():
        assert workload["spec"]["selector"]["matchLabels"] == pod(workload)["metadata"]["labels"]


def test_every_name_that_is_connected_to_is_that_of_a_service() -> None:
    """The hosts in the configurations resolve: services, and pods of the set behind a headless one."""
    services, middles = of("Service"), of("StatefulSet")["relay-middle"]
    names = {f"{middles['metadata']['name']}-{number}" for number in range(middles["spec"]["replicas"])}
    assert middles["spec"]["serviceName"] in services
    connected = set()
    for text in CONFIGS.values():
        for route in loads(text).routes.values():
            for end in (route.source, *(sink for _place, sink in route.sinks())):
                if end.connect is not None:
                    connected.add((end.connect.host, end.connect.port))
    for host, port in connected:
        pod_name, _dot, service = host.rpartition(".")
        assert service in services
        assert port in {each["port"] for each in services[service]["spec"]["ports"]}
        assert not pod_name or pod_name in names
    assert {host.partition(".")[0] for host, _port in connected if "." in host} == names
