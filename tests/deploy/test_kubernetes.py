"""The Helm chart, without a cluster: what it renders is what Kubernetes takes, and what its parts need of each other holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from backbone.settings import GatewaySettings, WorkerSettings
from tests.cluster import ROOT
from tests.deploy import charts
from tests.deploy.charts import CHART, EXAMPLES, Object, Refused, Rendered, containers, environment, pods, selects
from workers.backend_options import split_options
from workers.backends.base import make_backend
from workers.main import backend_config

VERSIONS = ["1.33", "1.37"]
"""The chart's `kubeVersion`, and the newest whose schemas are there."""
SETTINGS = {
    "gateway": {name.upper() for name in GatewaySettings.model_fields},
    "worker": {name.upper() for name in WorkerSettings.model_fields},
}
PORTS = {"http": 8800, "metrics": 8801}

# The part of https://gateway-api.sigs.k8s.io/reference/spec/#httproute that the chart uses: nothing on PyPI has it.
HTTP_ROUTE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["parentRefs", "rules"],
            "properties": {
                "hostnames": {"type": "array", "items": {"type": "string", "maxLength": 253}},
                "parentRefs": {
                    "type": "array",
                    "maxItems": 32,
                    "items": {
                        "additionalProperties": False,
                        "required": ["name"],
                        "properties": {
                            name: {"type": "string"} for name in ("group", "kind", "namespace", "name", "sectionName")
                        }
                        | {"port": {"type": "integer"}},
                    },
                },
                "rules": {
                    "type": "array",
                    "maxItems": 16,
                    "items": {
                        "additionalProperties": False,
                        "properties": {
                            "matches": {
                                "type": "array",
                                "items": {
                                    "additionalProperties": False,
                                    "properties": {
                                        "path": {
                                            "additionalProperties": False,
                                            "properties": {
                                                "type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                                                "value": {"type": "string", "pattern": "^/"},
                                            },
                                        }
                                    },
                                },
                            },
                            "timeouts": {
                                "additionalProperties": False,
                                "properties": {
                                    name: {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
                                    for name in ("request", "backendRequest")
                                },
                            },
                            "backendRefs": {
                                "type": "array",
                                "items": {
                                    "additionalProperties": False,
                                    "required": ["name", "port"],
                                    "properties": {"name": {"type": "string"}, "port": {"type": "integer"}},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(params=EXAMPLES)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return charts.examples()[request.param]


def taken(**values: Any) -> Rendered:
    [answer] = charts.render(values)
    assert isinstance(answer, Rendered), answer
    return answer


def check_model(each: Object) -> None:
    """Against models that are made from the operators' own definitions; they drop what they do not know."""
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as prometheus

    module = keda if each["apiVersion"] == "keda.sh/v1alpha1" else prometheus
    assert each["apiVersion"] in {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
    understood = getattr(module, each["kind"]).model_validate(each)
    kept = json.loads(understood.model_dump_json(by_alias=True, exclude_none=True, exclude_unset=True))
    assert kept["spec"] == each["spec"], "a field that is not known was dropped"


@cache
def schemas(version: str) -> tuple[Path, Registry[Any]]:
    """The folder of a version's schemas, which know every field, and what they refer to: read once, for it is large."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    resource = Resource.from_contents(definitions, default_specification=DRAFT202012)
    return folder, Registry().with_resource("_definitions.json", resource)


@cache
def validator(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    folder, registry = schemas(version)
    group, _, number = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], number) if part)
    schema = json.loads((folder / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def check(each: Object, version: str) -> None:
    validator(version, each["apiVersion"], each["kind"]).validate(each)


# --- What Kubernetes takes ---


def test_helms_linter_finds_nothing() -> None:
    assert charts.lint() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_one_that_kubernetes_knows(rendered: Rendered, version: str) -> None:
    """Unknown fields are refused too."""
    for each in rendered.objects:
        if each["apiVersion"].split("/")[0] in {"keda.sh", "monitoring.coreos.com"}:
            check_model(each)
        elif each["kind"] == "HTTPRoute":
            jsonschema.validate(each, HTTP_ROUTE)
        else:
            check(each, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_etcd_is_what_kubernetes_knows(version: str) -> None:
    secured = (CHART.parent / "etcd-secured.yaml").read_text()
    for each in yaml.safe_load_all((CHART.parent / "etcd.yaml").read_text() + "---\n" + secured):
        check(each, version)


def test_names_are_given_once(rendered: Rendered) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered.objects]
    assert len(names) == len(set(names))
    for _, name in names:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name), name
        assert len(name) <= 63


# --- What the parts need of each other ---


def test_settings_are_settings_that_exist(rendered: Rendered) -> None:
    """A misspelt one would be ignored in silence; and what is set is what the process takes."""
    for _, pod in pods(rendered):
        for container in containers(pod):
            if container["name"] in SETTINGS:
                given = environment(container)
                assert set(given) <= SETTINGS[container["name"]]
                plain = {name.lower(): value for name, value in given.items() if isinstance(value, str)}
                if container["name"] == "gateway":
                    GatewaySettings.model_validate(plain)
                else:
                    settings = WorkerSettings.model_validate(plain)
                    make_backend(settings.worker_backend, backend_config(settings))


def test_every_setting_of_a_server_is_the_charts_own() -> None:
    """Addresses and credentials have values; the same set twice would be one of two."""
    source = (CHART / "templates/gateway.yaml").read_text(), (CHART / "templates/workers.yaml").read_text()
    for text, role in zip(source, ("gateway", "worker"), strict=True):
        managed = set(re.findall(r'"([A-Z_]+)"', re.search(r"\$managed := list ([^\n]*?) -}}", text)[1]))  # type: ignore[index]
        mine = {name for name in SETTINGS[role] if name.startswith(("NATS_", "ETCD_"))}
        mine |= {name for name in SETTINGS[role] if role == "gateway" and name.startswith("REDIS_")}
        assert mine <= managed | {"REDIS_URL"}, mine - managed
        assert managed <= SETTINGS[role], managed - SETTINGS[role]


def test_a_probe_asks_a_port_that_is_there(rendered: Rendered) -> None:
    for _, pod in pods(rendered):
        for container in containers(pod):
            ports = {port["name"] for port in container.get("ports", [])}
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                if name in container:
                    probe = container[name].get("httpGet") or container[name]["tcpSocket"]
                    assert probe["port"] in ports, (container["name"], name)


def test_ports_are_those_that_processes_listen_on(rendered: Rendered) -> None:
    for _, pod in pods(rendered):
        for container in containers(pod):
            ports = {port["name"]: str(port["containerPort"]) for port in container.get("ports", [])}
            env = environment(container)
            if container["name"] == "gateway":
                assert (ports["http"], ports["metrics"]) == (env["GATEWAY_PORT"], env["OBSERVABILITY_PORT"])
                assert env["GATEWAY_HOST"] == env["OBSERVABILITY_HOST"] == "0.0.0.0"
            if container["name"] == "worker":
                assert ports["metrics"] == env["WORKER_OBSERVABILITY_PORT"]
                assert env["WORKER_OBSERVABILITY_HOST"] == "0.0.0.0"


def test_a_pod_is_stopped_later_than_its_process_ends(rendered: Rendered) -> None:
    """Else Kubernetes kills what would still have been answered or handed back."""
    for _, pod in pods(rendered):
        for container in containers(pod):
            env = environment(container)
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            if container["name"] == "gateway":
                assert grace >= float(env["GATEWAY_LAME_DUCK_S"]) + float(env["GATEWAY_DRAIN_S"]) + 5
            if container["name"] == "worker":
                assert grace >= float(env["WORKER_DRAIN_S"]) + 5


def test_selectors_select_the_pods_that_are_meant(rendered: Rendered) -> None:
    """Of a Service, a Deployment, a disruption budget, a monitor: each its own, and no other's."""
    there = {name: pod["metadata"]["labels"] for name, pod in pods(rendered)}

    def selected(selector: Object) -> set[str]:
        return {name for name, labels in there.items() if selects(selector, labels)}

    for each in rendered.of("Deployment") + rendered.of("PodDisruptionBudget"):
        assert selected(each["spec"]["selector"]) == {each["metadata"]["name"]}
    for each in rendered.of("Service"):
        assert selected({"matchLabels": each["spec"]["selector"]}) == {"nexus-gateway"}
        ports = {port["name"] for port in containers(dict(pods(rendered))["nexus-gateway"])[-1]["ports"]}
        assert all(port["targetPort"] in ports for port in each["spec"]["ports"])
    for each in rendered.of("PodMonitor"):
        assert selected(each["spec"]["selector"]) == {name for name in there if "-worker-" in name}
    for each in rendered.of("ServiceMonitor"):
        services = [
            one for one in rendered.of("Service") if selects(each["spec"]["selector"], one["metadata"]["labels"])
        ]
        assert [one["metadata"]["name"] for one in services] == ["nexus-gateway-metrics"]
        named = {port["name"] for port in services[0]["spec"]["ports"]}
        assert all(endpoint["port"] in named for endpoint in each["spec"]["endpoints"])


def test_scalers_scale_deployments_that_leave_it_to_them(rendered: Rendered) -> None:
    """A Deployment that says how many there are would put them back at each upgrade."""
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in rendered.of("HorizontalPodAutoscaler")}
    scaled |= {each["spec"]["scaleTargetRef"]["name"] for each in rendered.of("ScaledObject")}
    deployments = {each["metadata"]["name"]: each for each in rendered.of("Deployment")}
    assert scaled <= set(deployments)
    for name, each in deployments.items():
        assert ("replicas" in each["spec"]) == (name not in scaled)


def test_budgets_let_nodes_be_drained(rendered: Rendered) -> None:
    budgets = rendered.of("PodDisruptionBudget")
    assert budgets
    for each in budgets:
        assert each["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in each["spec"]


def test_containers_are_locked_down(rendered: Rendered) -> None:
    """No root, no writable system, no capability, no token; of Nexus's own containers."""
    for _, pod in pods(rendered):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            context = spec["securityContext"] | container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            if container["name"] != "server":
                assert context["readOnlyRootFilesystem"] is True
                assert context["runAsNonRoot"] is True
                assert context["runAsUser"] == 10001
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in spec.get("volumes", [])}
    for each in rendered.of("ServiceAccount"):
        assert each["automountServiceAccountToken"] is False


def test_every_pod_of_nexus_has_a_policy(rendered: Rendered) -> None:
    """And one alone."""
    policies = rendered.of("NetworkPolicy")
    for name, pod in pods(rendered):
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] != "test":
            mine = [each for each in policies if selects(each["spec"]["podSelector"], pod["metadata"]["labels"])]
            assert [each["spec"]["policyTypes"] for each in mine] == [["Ingress", "Egress"]], name


# --- Choices, one by one ---


def test_workers_reach_nats_etcd_and_names_and_nothing_else() -> None:
    policy = charts.examples()["defaults"].one("NetworkPolicy", "nexus-worker-echo")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 4222, 2379]
    assert [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]] == ["metrics"]


def test_servers_hear_nexus_alone_and_redis_gateways_alone() -> None:
    rendered = charts.examples()["defaults"]
    gateway, worker = (
        dict(pods(rendered))[name]["metadata"]["labels"] for name in ("nexus-gateway", "nexus-worker-echo")
    )
    for server, hears_workers in (("nats", True), ("etcd", True), ("redis", False)):
        first = rendered.one("NetworkPolicy", f"nexus-{server}")["spec"]["ingress"][0]
        peers = [peer["podSelector"] for peer in first["from"]]
        assert any(selects(peer, gateway) for peer in peers)
        assert any(selects(peer, worker) for peer in peers) == hears_workers
        assert not any(selects(peer, {"app.kubernetes.io/name": "other"}) for peer in peers)


def test_gateways_alone_reach_the_ledger() -> None:
    """With the password from a secret; nothing of it is there without a URL."""
    rendered = charts.examples()["everything"]
    gateway = dict(pods(rendered))["nexus-gateway"]
    env = {each["name"]: each.get("value") for each in gateway["spec"]["containers"][0]["env"]}
    assert env["LEDGER_URL"].startswith("postgresql://nexus@postgresql:5432/")
    assert env["LEDGER_PASSWORD_FILE"] == "/etc/nexus/secrets/ledger-password"
    [secrets] = [volume for volume in gateway["spec"]["volumes"] if volume["name"] == "secrets"]
    assert {"name": "nexus-ledger", "items": [{"key": "password", "path": "ledger-password"}]} in [
        source["secret"] for source in secrets["projected"]["sources"]
    ]
    [inside] = rendered.one("NetworkPolicy", "nexus-ledger")["spec"]["ingress"][0]["from"][:1]
    assert selects(inside["podSelector"], gateway["metadata"]["labels"])
    worker = dict(pods(rendered))["nexus-worker-echo"]
    assert not selects(inside["podSelector"], worker["metadata"]["labels"])
    without = charts.examples()["defaults"]
    names = {each["name"] for each in dict(pods(without))["nexus-gateway"]["spec"]["containers"][0]["env"]}
    assert not {name for name in names if name.startswith(("LEDGER", "USAGE"))}
    assert "nexus-ledger" not in {each["metadata"]["name"] for each in without.of("NetworkPolicy")}


def test_gateways_alone_have_the_keys_of_teams_and_the_providers_secret() -> None:
    """As files of secrets: no value stands in an environment, and none can be set there."""
    rendered = charts.examples()["everything"]
    gateway = dict(pods(rendered))["nexus-gateway"]
    env = {each["name"]: each.get("value") for each in gateway["spec"]["containers"][0]["env"]}
    folder = "/etc/nexus/secrets"
    files = {
        "TEAM_KEYS_FILE": "team-keys",
        "OIDC_CLIENT_SECRET_FILE": "oidc-client-secret",
        "OIDC_TLS_CA": "oidc-ca.crt",
    }
    assert files.items() == {name: str(env[name]).removeprefix(f"{folder}/") for name in files}.items()
    assert "OIDC_CLIENT_SECRET" not in env
    [secrets] = [volume for volume in gateway["spec"]["volumes"] if volume["name"] == "secrets"]
    mounted = {item["path"] for source in secrets["projected"]["sources"] for item in source["secret"]["items"]}
    assert set(files.values()) <= mounted
    for name, pod in pods(rendered):
        if name != "nexus-gateway":
            assert not any(secret in yaml.safe_dump(pod) for secret in ("nexus-team-keys", "nexus-oidc"))
    without = dict(pods(charts.examples()["defaults"]))["nexus-gateway"]["spec"]["containers"][0]["env"]
    assert not {each["name"] for each in without} & files.keys()


def test_servers_elsewhere_get_no_policy_and_are_reached_where_they_are() -> None:
    rendered = charts.examples()["external"]
    names = {each["metadata"]["name"] for each in rendered.of("NetworkPolicy")}
    assert names == {"nexus-gateway", "nexus-worker-openai"}
    egress = rendered.one("NetworkPolicy", "nexus-gateway")["spec"]["egress"]
    [redis] = [rule for rule in egress if rule["ports"] == [{"port": 6380}]]
    assert redis["to"] == [{"ipBlock": {"cidr": "10.20.1.0/24"}}]


def test_credentials_are_files_from_secrets_and_each_role_has_its_own() -> None:
    found = dict(pods(charts.examples()["external"]))
    for name, secret in (("nexus-gateway", "nexus-gateway"), ("nexus-worker-openai", "nexus-worker-openai")):
        pod = found[name]
        [volume] = [each for each in pod["spec"]["volumes"] if each["name"] == "secrets"]
        files = {item["path"] for source in volume["projected"]["sources"] for item in source["secret"]["items"]}
        env = environment(pod["spec"]["containers"][0])
        named = {
            value.rpartition("/")[2]
            for key, value in env.items()
            if key.endswith(("_FILE", "_CA", "_CERT", "_KEY")) and isinstance(value, str)
        }
        assert named == files
        assert volume["projected"]["sources"][0]["secret"]["name"] == secret
        assert not any(key.endswith("_PASSWORD") for key in env)
    worker = environment(found["nexus-worker-openai"]["spec"]["containers"][0])
    assert (worker["NATS_USER"], worker["NATS_INBOX_PREFIX"]) == ("worker-openai", "_INBOX.openai")
    assert "REDIS_URL" not in worker, "workers never talk to Redis"


def test_a_server_beside_its_worker_outlives_it() -> None:
    """A native sidecar is up before, and stopped after: what the worker drains still has somebody to run it."""
    pod = dict(pods(charts.examples()["gpu"]))["nexus-worker-llama"]
    [server] = pod["spec"]["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert server["startupProbe"]["httpGet"] == {"path": "/health", "port": "server"}
    assert server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"] == 1800
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_gpu_is_given_back_before_the_next_pod_wants_one() -> None:
    rendered = charts.examples()["gpu"]
    assert rendered.one("Deployment", "nexus-worker-llama")["spec"]["strategy"]["rollingUpdate"] == {
        "maxSurge": 0,
        "maxUnavailable": 1,
    }
    plain = charts.examples()["defaults"].one("Deployment", "nexus-worker-echo")
    assert plain["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_workers_are_scaled_by_the_largest_gateways_view_of_their_queues() -> None:
    """Every gateway shows all queues: their sum would be a multiple. What no gateway says is an error and not zero."""
    for example, name in (("gpu", "llama"), ("everything", "ollama")):
        scaled = charts.examples()[example].one("ScaledObject", f"nexus-worker-{name}")
        jobs = scaled["spec"]["triggers"][0]["metadata"]
        assert jobs["ignoreNullValues"] == "false"
        expression = promql_parser.parse(jobs["query"])
        assert str(expression).startswith("sum(max by (capability, lane, model)")
    assert 'model=~"llama3\\\\.1:8b|smollm2"' in jobs["query"]
    assert scaled["spec"]["triggers"][0]["authenticationRef"] == {"name": "prometheus"}


def test_what_rests_at_zero_is_woken_by_refused_requests_too() -> None:
    gpu = charts.examples()["gpu"].one("ScaledObject", "nexus-worker-llama")["spec"]
    assert (gpu["minReplicaCount"], [trigger["name"] for trigger in gpu["triggers"]]) == (0, ["jobs", "refused"])
    promql_parser.parse(gpu["triggers"][1]["metadata"]["query"])
    kept = charts.examples()["everything"].one("ScaledObject", "nexus-worker-ollama")["spec"]
    assert [trigger["name"] for trigger in kept["triggers"]] == ["jobs"]


def test_options_and_numbers_arrive_as_they_are_read() -> None:
    found = dict(pods(charts.examples()["everything"]))
    gateway = environment(found["nexus-gateway"]["spec"]["containers"][0])
    assert gateway["MAX_BLOB_BYTES"] == "8589934592"
    rendered = taken(workers=[{"name": "x", "backend": "command", "options": {"run": "a, b", "n": 2}}])
    worker = environment(dict(pods(rendered))["nexus-worker-x"]["spec"]["containers"][0])
    assert split_options(worker["WORKER_BACKEND_OPTIONS"]) == {"run": "a, b", "n": "2"}


def test_without_a_secret_the_chart_makes_a_key_and_keeps_it() -> None:
    secret = charts.examples()["defaults"].one("Secret", "nexus-key")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert charts.examples()["everything"].of("Secret") == []


def test_helm_test_runs_python_that_compiles() -> None:
    pod = charts.examples()["everything"].one("Pod", "nexus-verify")
    [container] = pod["spec"]["containers"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    compile(container["args"][0], "verify", "exec")
    assert container["args"][0].strip() == (CHART / "files/verify.py").read_text().strip()


def test_the_notes_say_how_to_get_the_key() -> None:
    assert "get secret nexus-key -o jsonpath='{.data.bearer-token}'" in charts.examples()["defaults"].notes


def test_alarms_and_dashboards_are_those_of_the_repository() -> None:
    """A chart holds its own files; they are copies."""
    assert (CHART / "files/alerts.yml").read_bytes() == (ROOT / "deploy/prometheus/alerts.yml").read_bytes()
    here = {path.name: path.read_bytes() for path in (CHART / "files/dashboards").glob("*.json")}
    there = {path.name: path.read_bytes() for path in (ROOT / "deploy/grafana").glob("nexus-*.json")}
    assert here == there
    rendered = charts.examples()["everything"]
    rules = rendered.one("PrometheusRule", "nexus")["spec"]
    assert rules == yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert len([each for each in rendered.of("ConfigMap") if "dashboard" in each["metadata"]["name"]]) == len(there)


def test_values_name_every_default_that_the_schema_knows() -> None:
    """What can be set is found in values.yaml, be it in a comment."""
    text = (CHART / "values.yaml").read_text()
    schema = json.loads((CHART / "values.schema.json").read_text())

    def names(node: Object) -> set[str]:
        inner = node.get("properties", {})
        items = node.get("items", {})
        return set(inner).union(*map(names, inner.values()), names(items) if items else set())

    missing = {name for name in names(schema) if not re.search(rf"\b{re.escape(name)}\b", text)}
    assert missing == {"global"}


# --- What is refused, and how ---


REFUSED: list[tuple[Object, str]] = [
    ({"gatewey": {}}, "gatewey"),
    ({"gateway": {"replicas": "two"}}, "replicas"),
    ({"gateway": {"pdb": {"maxUnavailable": 0}}}, "maxUnavailable"),
    ({"workers": [{"name": "x"}]}, "backend"),
    ({"workers": [{"name": "Not_A_Name", "backend": "echo"}]}, "name"),
    ({"workers": [{"name": "x", "backend": "echo", "model": ["m"]}]}, "model"),
    ({"workers": [{"name": "x", "backend": "openai", "server": {"image": "a"}}]}, "port"),
    ({"nats": {"url": "nats:4222"}}, "url"),
    ({"etcd": {"prefix": "nexus"}}, "prefix"),
    ({"etcd": {"tls": {"cert": "tls.crt"}}}, "key"),
    ({"settings": {"log_level": "debug"}}, "log_level"),
    ({"gateway": {"settings": {"OIDC_CLIENT_SECRET": "s"}}}, "OIDC_CLIENT_SECRET"),
    ({"gateway": {"settings": {"TEAM_KEYS_FILE": "/tmp/keys"}}}, "TEAM_KEYS_FILE"),
    ({"workers": [{"name": "a", "backend": "echo"}, {"name": "a", "backend": "echo"}]}, "two are named a"),
    ({"gateway": {"settings": {"NATS_URL": "x"}}}, "NATS_URL is set by the chart itself"),
    ({"settings": {"GATEWAY_WORKERS": 4}}, "GATEWAY_WORKERS is set by the chart itself"),
    ({"workers": [{"name": "a", "backend": "echo", "autoscaling": {"enabled": True}}]}, "name the models"),
    ({"ingress": {"enabled": True}}, "ingress.hosts"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
]


@cache
def refusals() -> list[Rendered | Refused]:
    return charts.render(*(values for values, _ in REFUSED))


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[said for _, said in REFUSED])
def test_what_is_wrong_is_said_before_anything_is_installed(number: int) -> None:
    answer = refusals()[number]
    assert isinstance(answer, Refused), "Helm takes it"
    assert REFUSED[number][1] in str(answer)


# --- etcd, which has no chart of its own that is kept well ---


@pytest.mark.parametrize("name", ["etcd.yaml", "etcd-secured.yaml"])
def test_etcds_members_know_each_other_and_their_probes(name: str) -> None:
    objects = list(yaml.safe_load_all((CHART.parent / name).read_text()))
    [members] = [each for each in objects if each["kind"] == "StatefulSet"]
    [container] = members["spec"]["template"]["spec"]["containers"]
    headless = {
        each["metadata"]["name"]
        for each in objects
        if each["kind"] == "Service" and each["spec"].get("clusterIP") == "None"
    }
    assert members["spec"]["serviceName"] in headless
    [initial] = [arg for arg in container["args"] if arg.startswith("--initial-cluster=")]
    assert len(initial.split(",")) == members["spec"]["replicas"]
    ports = {port["name"] for port in container["ports"]}
    assert {
        container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe", "startupProbe")
    } <= ports
    labels = members["spec"]["template"]["metadata"]["labels"]
    for each in objects:
        if each["kind"] in {"Service", "PodDisruptionBudget"}:
            selector = each["spec"]["selector"]
            assert selects(selector if "matchLabels" in selector else {"matchLabels": selector}, labels)
    policy = charts.examples()["defaults"].one("NetworkPolicy", "nexus-etcd")
    assert selects(policy["spec"]["podSelector"], labels), "the chart's policy guards it"


def test_the_secured_etcd_is_the_plain_one_with_certificates_of_all() -> None:
    """The same image, volumes and limits; clients and peers alike show a certificate, and nothing but probes is without TLS."""
    plain, secured = (
        next(each for each in yaml.safe_load_all((CHART.parent / name).read_text()) if each["kind"] == "StatefulSet")
        for name in ("etcd.yaml", "etcd-secured.yaml")
    )
    [before], [after] = (each["spec"]["template"]["spec"]["containers"] for each in (plain, secured))
    assert {key for key in before if before[key] != after[key]} == {"args", "volumeMounts"}
    added = set(after["args"]) - {arg.replace("http://", "https://") for arg in before["args"]}
    assert {"--client-cert-auth", "--peer-client-cert-auth"} < added
    assert [arg for arg in after["args"] if "http://" in arg] == ["--listen-metrics-urls=http://0.0.0.0:2381"]
    [volume] = secured["spec"]["template"]["spec"]["volumes"]
    files = {arg.rpartition("/")[2] for arg in after["args"] if "/etc/etcd/secrets/" in arg}
    assert files == {"ca.crt", "etcd.crt", "etcd.key"}, f"what README puts into {volume['secret']['secretName']}"


def test_the_verify_script_says_what_is_wrong() -> None:
    done = subprocess.run(
        [sys.executable, str(CHART / "files/verify.py")],
        env={"NEXUS_URL": "http://127.0.0.1:9", "NEXUS_MODEL": "", "NEXUS_KEY": "k"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "/readyz" in done.stderr
