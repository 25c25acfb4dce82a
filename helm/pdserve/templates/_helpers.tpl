{{/* Short enough that every suffix of ours fits into 63 characters. */}}
{{- define "pdserve.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Selectors are immutable: name, instance and component, and never anything that a user edits.
     Takes (dict "root" $ "component" "router"). */}}
{{- define "pdserve.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "pdserve.labels" -}}
{{ include "pdserve.selector" . }}
app.kubernetes.io/part-of: pdserve
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "pdserve.podLabels" -}}
{{ include "pdserve.labels" . }}
{{- with .root.Values.pod.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "pdserve.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What every pod has: no token of the API server, no environment from Services, a user that is not root. */}}
{{- define "pdserve.podDefaults" -}}
automountServiceAccountToken: false
enableServiceLinks: false
serviceAccountName: {{ include "pdserve.fullname" . }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.pod.uid }}
  runAsGroup: {{ .Values.pod.uid }}
  fsGroup: {{ .Values.pod.uid }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "pdserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Draining and a half more, so that the kubelet never kills what is still ending. */}}
{{- define "pdserve.grace" -}}
{{ ceil (mulf (addf .preStop .drain) 1.5) | int }}
{{- end }}

{{/* A Redis URL carries a password: it comes from a Secret into the environment, never into arguments. */}}
{{- define "pdserve.redisEnv" -}}
- name: PDSERVE_REDIS_URL
  valueFrom:
    secretKeyRef:
{{- if .Values.redis.enabled }}
      name: {{ include "pdserve.fullname" . }}-redis
      key: url
{{- else }}
      name: {{ .Values.redis.external.existingSecret }}
      key: {{ .Values.redis.external.key }}
{{- end }}
{{- end }}

{{- define "pdserve.commonEnv" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: HOME
  value: /tmp
- name: PDSERVE_CACHE
  value: /cache
{{ include "pdserve.redisEnv" . }}
{{- if .Values.security.tlsSecret }}
- {name: PDSERVE_TLS_DIR, value: /etc/pdserve/tls}
{{- end }}
{{- end }}

{{/* Certificates of the deployment, readable by the group that every pod runs as. */}}
{{- define "pdserve.tlsVolume" -}}
{{- with .Values.security.tlsSecret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "pdserve.tlsMount" -}}
{{- if .Values.security.tlsSecret }}
- {name: tls, mountPath: /etc/pdserve/tls, readOnly: true}
{{- end }}
{{- end }}

{{/* `default` builds the model in the cache volume; a link gives it the name that clients use. */}}
{{- define "pdserve.modelFolder" -}}
/models/{{ .Values.model.name }}
{{- end }}

{{- define "pdserve.modelVolumes" -}}
- name: model
{{- $source := .Values.model.source }}
{{- if hasPrefix "pvc://" $source }}
  persistentVolumeClaim: {claimName: {{ (split "/" (trimPrefix "pvc://" $source))._0 }}, readOnly: true}
{{- else if hasPrefix "file://" $source }}
  hostPath: {path: {{ trimPrefix "file://" $source }}, type: Directory}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.model.size }}}
{{- end }}
- name: cache
  emptyDir: {}
- name: tmp
  emptyDir: {}
{{- end }}

{{- define "pdserve.modelMount" -}}
- name: model
{{- $source := .Values.model.source }}
{{- if hasPrefix "pvc://" $source }}
  mountPath: {{ include "pdserve.modelFolder" . }}
  {{- with regexReplaceAll "^[^/]+/?" (trimPrefix "pvc://" $source) "" }}
  subPath: {{ . }}
  {{- end }}
{{- else if hasPrefix "file://" $source }}
  mountPath: {{ include "pdserve.modelFolder" . }}
{{- else }}
  mountPath: /models
{{- end }}
  readOnly: true
{{- end }}

{{/* Fetches what is not on a volume yet; the last step makes the folder visible, so a half download is never served. */}}
{{- define "pdserve.modelInit" -}}
{{- $source := .Values.model.source }}
{{- if or (eq $source "default") (hasPrefix "hf://" $source) }}
initContainers:
  - name: model
    image: {{ include "pdserve.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    securityContext: {{- include "pdserve.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: 500m, memory: 2Gi}
      limits: {memory: 4Gi}
    env:
      - {name: HOME, value: /tmp}
      - {name: TARGET, value: {{ include "pdserve.modelFolder" . }}}
      {{- if eq $source "default" }}
      - {name: PDSERVE_CACHE, value: /models/.cache}
      {{- else }}
      - {name: REPOSITORY, value: {{ trimPrefix "hf://" $source | quote }}}
      - {name: REVISION, value: {{ .Values.model.revision | quote }}}
      {{- with .Values.model.hfToken }}
      {{- if .existingSecret }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}}
      {{- end }}
      {{- end }}
      {{- end }}
    command: [sh, -euc]
    args:
      {{- if eq $source "default" }}
      - |
        python -c "
          from pathlib import Path
          from pdserve.models.default_model import ensure_default_model
          print(ensure_default_model(Path('/models/.cache'), lambda *_: None))" > /tmp/folder
        ln -sfn "$(cat /tmp/folder)" "$TARGET"
      {{- else }}
      - |
        [ -d "$TARGET" ] && exit 0
        hf download "$REPOSITORY" --revision "$REVISION" --local-dir "$TARGET.part"
        mv "$TARGET.part" "$TARGET"
      {{- end }}
    volumeMounts:
      - {name: model, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}

{{/* Pods of one component are kept apart by node. matchLabelKeys counts each rollout for itself. */}}
{{- define "pdserve.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "pdserve.selector" . | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}

{{/* Startup may load a large model; liveness asks for an answer only, since a restart loads it again. */}}
{{- define "pdserve.probes" -}}
startupProbe:
  httpGet: {path: /livez, port: {{ . }}}
  periodSeconds: 10
  failureThreshold: 360
livenessProbe:
  httpGet: {path: /livez, port: {{ . }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 5
readinessProbe:
  httpGet: {path: /readyz, port: {{ . }}}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{- define "pdserve.pdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "pdserve.fullname" .root }}-{{ .component }}
  labels: {{- include "pdserve.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "pdserve.selector" . | nindent 6 }}
{{- end }}

{{/* Pods of this release. Takes (dict "root" $ "components" (list "router")). */}}
{{- define "pdserve.peers" }}
{{- $root := .root }}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ $root.Chart.Name }}
      app.kubernetes.io/instance: {{ $root.Release.Name }}
    matchExpressions:
      - {key: app.kubernetes.io/component, operator: In, values: [{{ join ", " .components }}]}
{{- end }}

{{/* What every pod of ours may call: DNS, Redis, and the source of a download. */}}
{{- define "pdserve.egressBasics" }}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- if .root.Values.redis.enabled }}
- to: {{- include "pdserve.peers" (dict "root" .root "components" (list "redis")) | nindent 4 }}
  ports: [{port: 6379}]
{{- else }}
# The external Redis: its port is inside a Secret.
- {}
{{- end }}
{{- if .downloads }}
- ports: [{port: 443}]
{{- end }}
{{- end }}
