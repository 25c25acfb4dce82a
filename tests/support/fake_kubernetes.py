"""A small Kubernetes API server on loopback: enough of it for helm and kubectl, with no scheduler and no validation.

Discovery, CRUD, label selectors, patches (all as JSON merge), watches, `/scale`; Deployments are ready at once. Clients
of helm send its own Secrets as protobuf, which `decode` reads. Usage: fake_kubernetes.py PORT SECONDS
"""

import http.server
import json
import sys
import threading
import time
import urllib.parse
import uuid
from typing import ClassVar

import yaml

R = {  # group/version -> {plural: (Kind, namespaced)}
    "v1": {
        "namespaces": ("Namespace", 0),
        "pods": ("Pod", 1),
        "services": ("Service", 1),
        "secrets": ("Secret", 1),
        "configmaps": ("ConfigMap", 1),
        "serviceaccounts": ("ServiceAccount", 1),
        "persistentvolumeclaims": ("PersistentVolumeClaim", 1),
        "events": ("Event", 1),
        "nodes": ("Node", 0),
        "endpoints": ("Endpoints", 1),
    },
    "apps/v1": {
        "deployments": ("Deployment", 1),
        "statefulsets": ("StatefulSet", 1),
        "replicasets": ("ReplicaSet", 1),
        "daemonsets": ("DaemonSet", 1),
    },
    "batch/v1": {"jobs": ("Job", 1), "cronjobs": ("CronJob", 1)},
    "autoscaling/v2": {"horizontalpodautoscalers": ("HorizontalPodAutoscaler", 1)},
    "policy/v1": {"poddisruptionbudgets": ("PodDisruptionBudget", 1)},
    "networking.k8s.io/v1": {"networkpolicies": ("NetworkPolicy", 1), "ingresses": ("Ingress", 1)},
    "rbac.authorization.k8s.io/v1": {
        "roles": ("Role", 1),
        "rolebindings": ("RoleBinding", 1),
        "clusterroles": ("ClusterRole", 0),
        "clusterrolebindings": ("ClusterRoleBinding", 0),
    },
    "discovery.k8s.io/v1": {"endpointslices": ("EndpointSlice", 1)},
    "monitoring.coreos.com/v1": {
        "servicemonitors": ("ServiceMonitor", 1),
        "podmonitors": ("PodMonitor", 1),
        "prometheusrules": ("PrometheusRule", 1),
    },
    "keda.sh/v1alpha1": {"scaledobjects": ("ScaledObject", 1)},
    "gateway.networking.k8s.io/v1": {"gateways": ("Gateway", 1), "httproutes": ("HTTPRoute", 1)},
    "inference.networking.k8s.io/v1": {"inferencepools": ("InferencePool", 1)},
}
SHORT = {
    "deployments": ["deploy"],
    "services": ["svc"],
    "serviceaccounts": ["sa"],
    "configmaps": ["cm"],
    "pods": ["po"],
    "statefulsets": ["sts"],
    "horizontalpodautoscalers": ["hpa"],
    "persistentvolumeclaims": ["pvc"],
    "poddisruptionbudgets": ["pdb"],
    "namespaces": ["ns"],
}
DB, LOG, LOCK, RV = {}, [], threading.Condition(), [1]  # DB[(gv,plural,ns,name)] = object


def pb(b):
    i, out = 0, {}

    def varint():
        nonlocal i
        r = sh = 0
        while True:
            c = b[i]
            i += 1
            r |= (c & 127) << sh
            sh += 7
            if c < 128:
                return r

    while i < len(b):
        t = varint()
        f, w = t >> 3, t & 7
        if w == 2:
            n = varint()
            v = b[i : i + n]
            i += n
        elif w == 0:
            v = varint()
        else:
            raise ValueError(w)
        out.setdefault(f, []).append(v)
    return out


def decode(body):
    """Newer client-go typed clients (helm's storage driver) send protobuf: decode Secret/ConfigMap."""
    if not body.startswith(b"k8s\0"):
        return yaml.safe_load(body) if body else {}
    import base64

    u = pb(body[4:])
    tm = pb(u[1][0])
    o = pb(u[2][0])
    m = pb(o[1][0])
    kind = tm[2][0].decode()

    def kv(entries, of=bytes.decode):
        return {pb(x)[1][0].decode(): of(pb(x).get(2, [b""])[0]) for x in entries}

    return {
        "apiVersion": tm[1][0].decode(),
        "kind": kind,
        "metadata": {"name": m[1][0].decode(), "labels": kv(m.get(11, [])), "annotations": kv(m.get(12, []))},
        "data": kv(o.get(2, []), (lambda x: base64.b64encode(x).decode()) if kind == "Secret" else bytes.decode),
        **({"type": o[3][0].decode()} if kind == "Secret" and 3 in o else {}),
    }


def merge(a, b):
    if not isinstance(b, dict) or not isinstance(a, dict):
        return b
    o = dict(a)
    for k, v in b.items():
        if v is None:
            o.pop(k, None)
        elif k.startswith("$"):
            continue
        else:
            o[k] = merge(o.get(k), v) if isinstance(v, dict) else v
    return o


def selected(o, sel):
    labels = o.get("metadata", {}).get("labels") or {}
    for t in filter(None, (sel or "").split(",")):
        if "!=" in t:
            k, v = t.split("!=", 1)
            ok = labels.get(k) != v
        elif "=" in t:
            k, v = t.replace("==", "=").split("=", 1)
            ok = labels.get(k) == v
        else:
            ok = t in labels
        if not ok:
            return False
    return True


class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(s, *a):
        pass

    def out(s, code, o):
        b = json.dumps(o).encode()
        s.send_response(code)
        s.send_header("Content-Type", "application/json")
        s.send_header("Content-Length", str(len(b)))
        s.end_headers()
        s.wfile.write(b)

    def err(s, code, reason, msg):
        s.out(
            code,
            {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "code": code,
                "reason": reason,
                "message": msg,
                "details": {},
            },
        )

    def handle_any(s):
        u = urllib.parse.urlsplit(s.path)
        q = dict(urllib.parse.parse_qsl(u.query))
        p = [x for x in u.path.split("/") if x]
        m = s.command
        n = int(s.headers.get("Content-Length") or 0)
        body = s.rfile.read(n) if n else b""
        LOG.append((m, s.path))
        if u.path == "/version":
            return s.out(200, {"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
        if p == ["api"]:
            return s.out(200, {"kind": "APIVersions", "versions": ["v1"]})
        if p == ["apis"]:
            return s.out(
                200,
                {
                    "kind": "APIGroupList",
                    "apiVersion": "v1",
                    "groups": [
                        {
                            "name": g.split("/")[0],
                            "versions": [{"groupVersion": g, "version": g.split("/")[1]}],
                            "preferredVersion": {"groupVersion": g, "version": g.split("/")[1]},
                        }
                        for g in R
                        if "/" in g
                    ],
                },
            )
        if p[:1] == ["openapi"]:
            return s.out(200, {"paths": {}}) if p[1:] == ["v3"] else s.err(404, "NotFound", "no openapi")
        if p[:1] == ["api"]:
            gv, p = "v1", p[2:]
        elif p[:1] == ["apis"] and len(p) >= 3:
            gv, p = p[1] + "/" + p[2], p[3:]
        else:
            return s.err(404, "NotFound", u.path)
        if gv not in R:
            return s.err(404, "NotFound", gv)
        if not p:
            rs = []
            for pl, (k, nsd) in R[gv].items():
                rs.append(
                    {
                        "name": pl,
                        "singularName": k.lower(),
                        "namespaced": bool(nsd),
                        "kind": k,
                        "shortNames": SHORT.get(pl, []),
                        "categories": ["all"]
                        if pl in ("pods", "services", "deployments", "statefulsets", "jobs", "horizontalpodautoscalers")
                        else [],
                        "verbs": ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
                    }
                )
                if pl in ("deployments", "statefulsets"):
                    rs.append(
                        {
                            "name": pl + "/scale",
                            "namespaced": True,
                            "kind": "Scale",
                            "group": "autoscaling",
                            "version": "v1",
                            "verbs": ["get", "patch", "update"],
                            "singularName": "",
                        }
                    )
            return s.out(200, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": gv, "resources": rs})
        ns = ""
        if p[0] == "namespaces" and len(p) >= 3 and p[2] in R[gv]:
            ns, p = p[1], p[2:]
        pl, name, sub = p[0], (p[1] if len(p) > 1 else None), (p[2] if len(p) > 2 else None)
        if pl not in R[gv]:
            return s.err(404, "NotFound", pl)
        kind, nsd = R[gv][pl]
        key = (gv, pl, ns, name)
        with LOCK:
            if m == "GET" and name is None:
                items = [
                    o
                    for (g, plural, n_, _), o in sorted(DB.items())
                    if (g, plural) == (gv, pl)
                    and (not ns or n_ == ns)
                    and selected(o, q.get("labelSelector"))
                    and s.field(o, q.get("fieldSelector"))
                ]
                if q.get("watch") in ("true", "1"):
                    pass
                else:
                    return s.out(
                        200,
                        {
                            "kind": kind + "List",
                            "apiVersion": gv,
                            "metadata": {"resourceVersion": str(RV[0])},
                            "items": items,
                        },
                    )
            elif m == "GET":
                if key not in DB:
                    return s.err(404, "NotFound", f'{pl} "{name}" not found')
                o = DB[key]
                if sub == "scale":
                    o = {
                        "kind": "Scale",
                        "apiVersion": "autoscaling/v1",
                        "metadata": o["metadata"],
                        "spec": {"replicas": o["spec"].get("replicas", 1)},
                        "status": {"replicas": o.get("status", {}).get("replicas", 0)},
                    }
                return s.out(200, o)
            elif m == "DELETE":
                if key not in DB:
                    return s.err(404, "NotFound", f'{pl} "{name}" not found')
                o = DB.pop(key)
                s.ev("DELETED", key, o)
                return s.out(200, o)
            else:
                o = decode(body)
                code, old = 200, None
                if m == "POST":
                    name = o["metadata"].get("name") or o["metadata"]["generateName"] + uuid.uuid4().hex[:5]
                    o["metadata"]["name"] = name
                    key = (gv, pl, ns, name)
                    code = 201
                    if key in DB:
                        return s.err(409, "AlreadyExists", f'{pl} "{name}" already exists')
                else:
                    old = DB.get(key)
                    ssa = "apply-patch" in s.headers.get("Content-Type", "")
                    if old is None and not ssa:
                        return s.err(404, "NotFound", f'{pl} "{name}" not found')
                    if sub == "scale":
                        o = merge(old, {"spec": {"replicas": o["spec"]["replicas"]}})
                    elif m == "PATCH":
                        if isinstance(o, list):
                            return s.err(415, "UnsupportedMediaType", "json-patch")
                        o = merge(old or {}, o)
                        code = 200 if old else 201
                if q.get("dryRun"):
                    return s.out(code, o)
                RV[0] += 1
                md = o.setdefault("metadata", {})
                md["name"] = name
                if nsd:
                    md["namespace"] = ns
                md["resourceVersion"] = str(RV[0])
                md["uid"] = (old or {}).get("metadata", {}).get("uid") or str(uuid.uuid4())
                md["creationTimestamp"] = (old or {}).get("metadata", {}).get("creationTimestamp") or time.strftime(
                    "%Y-%m-%dT%H:%M:%SZ", time.gmtime()
                )
                if old is None or old.get("spec") != o.get("spec"):
                    md["generation"] = (old or {}).get("metadata", {}).get("generation", 0) + 1
                o.setdefault("kind", kind)
                o.setdefault("apiVersion", gv)
                if kind in ("Deployment", "StatefulSet"):  # a controller that is always instantly done
                    r = o["spec"].get("replicas", 1)
                    o["status"] = {
                        "observedGeneration": md.get("generation", 1),
                        "replicas": r,
                        "readyReplicas": r,
                        "availableReplicas": r,
                        "updatedReplicas": r,
                        "currentReplicas": r,
                        "conditions": [{"type": "Available", "status": "True"}],
                    }
                if kind == "Service" and "clusterIP" not in o["spec"]:
                    o["spec"]["clusterIP"] = f"10.96.0.{len(DB) % 250 + 1}"
                if kind == "Deployment":  # helm --wait looks for the newest ReplicaSet of a Deployment
                    rk = ("apps/v1", "replicasets", ns, name + "-1")
                    DB[rk] = {
                        "kind": "ReplicaSet",
                        "apiVersion": "apps/v1",
                        "metadata": {
                            "name": name + "-1",
                            "namespace": ns,
                            "uid": "rs-" + md["uid"],
                            "resourceVersion": str(RV[0]),
                            "creationTimestamp": md["creationTimestamp"],
                            "labels": o["spec"]["template"]["metadata"].get("labels", {}),
                            "ownerReferences": [
                                {
                                    "apiVersion": "apps/v1",
                                    "kind": "Deployment",
                                    "name": name,
                                    "uid": md["uid"],
                                    "controller": True,
                                }
                            ],
                        },
                        "spec": {"replicas": r, "selector": o["spec"]["selector"], "template": o["spec"]["template"]},
                        "status": {"replicas": r, "readyReplicas": r, "availableReplicas": r},
                    }
                if kind == "Pod":
                    o["status"] = {"phase": "Succeeded"}
                if kind == "Job":
                    o["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
                DB[key] = o
                s.ev("MODIFIED" if old else "ADDED", key, o)
                if sub == "scale":
                    o = {
                        "kind": "Scale",
                        "apiVersion": "autoscaling/v1",
                        "metadata": md,
                        "spec": {"replicas": o["spec"]["replicas"]},
                        "status": {"replicas": o["spec"]["replicas"]},
                    }
                return s.out(code, o)
        s.watch(gv, pl, ns, q, items)

    @staticmethod
    def field(o, sel):
        for t in filter(None, (sel or "").split(",")):
            k, v = t.replace("==", "=").split("=", 1)
            c = o
            for part in k.split("."):
                c = (c or {}).get(part)
            if c != v:
                return False
        return True

    EV: ClassVar[list] = []

    def ev(s, t, key, o):
        H.EV.append((t, key, json.loads(json.dumps(o))))
        LOCK.notify_all()

    def watch(s, gv, pl, ns, q, items):
        s.send_response(200)
        s.send_header("Content-Type", "application/json")
        s.send_header("Transfer-Encoding", "chunked")
        s.end_headers()

        def w(t, o):
            b = json.dumps({"type": t, "object": o}).encode() + b"\n"
            s.wfile.write(b"%x\r\n%s\r\n" % (len(b), b))
            s.wfile.flush()

        with LOCK:
            i = len(H.EV)
        rv = int(q.get("resourceVersion") or 0)
        try:
            if rv == 0:
                for o in items:
                    w("ADDED", dict(o, kind=R[gv][pl][0], apiVersion=gv))
                if q.get("sendInitialEvents") == "true":  # client-go WatchList (default in client-go >= 1.35, helm 4)
                    w(
                        "BOOKMARK",
                        {
                            "kind": R[gv][pl][0],
                            "apiVersion": gv,
                            "metadata": {
                                "resourceVersion": str(RV[0]),
                                "annotations": {"k8s.io/initial-events-end": "true"},
                            },
                        },
                    )
            else:
                with LOCK:
                    past = [e for e in H.EV[:i] if int(e[2]["metadata"]["resourceVersion"]) > rv]
                for t, k, o in past:
                    if (
                        k[:2] == (gv, pl)
                        and (not ns or k[2] == ns)
                        and selected(o, q.get("labelSelector"))
                        and s.field(o, q.get("fieldSelector"))
                    ):
                        w(t, o)
            end = time.time() + float(q.get("timeoutSeconds") or 60)
            while time.time() < end:
                with LOCK:
                    if len(H.EV) <= i:
                        LOCK.wait(0.5)
                    new, i = H.EV[i:], len(H.EV)
                for t, k, o in new:
                    if (
                        k[:2] == (gv, pl)
                        and (not ns or k[2] == ns)
                        and selected(o, q.get("labelSelector"))
                        and s.field(o, q.get("fieldSelector"))
                    ):
                        w(t, o)
            s.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any


def serve(port=0):
    srv = http.server.ThreadingHTTPServer(("127.0.0.1", port), H)
    srv.daemon_threads = True
    DB[("v1", "namespaces", "", "default")] = {
        "kind": "Namespace",
        "apiVersion": "v1",
        "metadata": {"name": "default", "resourceVersion": "1", "uid": "0"},
        "status": {"phase": "Active"},
    }
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    return srv


if __name__ == "__main__":
    serve(int(sys.argv[1]))
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
