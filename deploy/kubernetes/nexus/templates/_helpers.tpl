{{- define "nexus.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "nexus.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "nexus.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "nexus.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "nexus.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "nexus.selector" . }}
{{- end -}}

{{- define "nexus.selector" -}}
app.kubernetes.io/name: {{ include "nexus.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nexus.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "nexus.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- /* (dict "root" $ "repository" "nexus-gateway") */ -}}
{{- define "nexus.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .repository }}:{{ $image.tag | default .root.Chart.AppVersion -}}
{{- end -}}

{{- define "nexus.keySecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-key" (include "nexus.fullname" .)) -}}
{{- end -}}

{{- /* A worker as it is: what its entry says over what workerDefaults say. (dict "root" $ "worker" .) */ -}}
{{- define "nexus.worker" -}}
{{- mergeOverwrite (deepCopy .root.Values.workerDefaults) (deepCopy .worker) | toYaml -}}
{{- end -}}

{{- define "nexus.workerName" -}}
{{- printf "%s-worker-%s" (include "nexus.fullname" .root) .worker.name -}}
{{- end -}}

{{- define "nexus.workerModels" -}}
{{- $auto := .worker.autoscaling | default dict -}}
{{- dict "models" ($auto.models | default .worker.models | default list) | toYaml -}}
{{- end -}}

{{- /* Settings by their names. (dict "settings" … "managed" (list …) "where" "gateway.settings") */ -}}
{{- define "nexus.settings" -}}
{{- $managed := .managed -}}
{{- $where := .where -}}
{{- range $name, $value := .settings }}
{{- if has $name $managed }}
{{- fail (printf "%s: %s is set by the chart itself; see values.yaml for the value that it follows from" $where $name) }}
{{- end }}
- name: {{ $name }}
  {{- if and (kindIs "float64" $value) (eq (float64 $value) (floor $value)) }}
  value: {{ printf "%.0f" $value | quote }}
  {{- else }}
  value: {{ $value | toString | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /*
How a process reaches NATS and etcd, and gateways Redis, the ledger and the identity provider; and the keys of teams. (dict "root" $ "role" "gateway" "nats" … "etcd" …)
*/ -}}
{{- define "nexus.serversEnv" -}}
{{- $values := .root.Values -}}
{{- $dir := "/etc/nexus/secrets" -}}
- name: NATS_URL
  value: {{ $values.nats.url | quote }}
{{- with .nats.user }}
- name: NATS_USER
  value: {{ . | quote }}
{{- end }}
{{- with .nats.inboxPrefix }}
- name: NATS_INBOX_PREFIX
  value: {{ . | quote }}
{{- end }}
{{- if .nats.existingSecret }}
{{- if .nats.creds }}
- name: NATS_CREDS_FILE
  value: {{ $dir }}/nats-creds
{{- else }}
- name: NATS_PASSWORD_FILE
  value: {{ $dir }}/nats-password
{{- end }}
{{- end }}
{{- include "nexus.tlsEnv" (dict "server" "nats" "tls" $values.nats.tls) }}
- name: ETCD_URL
  value: {{ $values.etcd.url | quote }}
- name: ETCD_PREFIX
  value: {{ $values.etcd.prefix | quote }}
{{- with .etcd.user }}
- name: ETCD_USER
  value: {{ . | quote }}
{{- end }}
{{- if .etcd.existingSecret }}
- name: ETCD_PASSWORD_FILE
  value: {{ $dir }}/etcd-password
{{- end }}
{{- include "nexus.tlsEnv" (dict "server" "etcd" "tls" $values.etcd.tls) }}
{{- if eq .role "gateway" }}
- name: REDIS_URL
  value: {{ $values.redis.url | quote }}
{{- if $values.redis.existingSecret }}
- name: REDIS_PASSWORD_FILE
  value: {{ $dir }}/redis-password
{{- end }}
{{- include "nexus.tlsEnv" (dict "server" "redis" "tls" $values.redis.tls) }}
{{- with $values.ledger.url }}
- name: LEDGER_URL
  value: {{ . | quote }}
- name: USAGE_JOURNAL_DIR
  value: /tmp/usage
{{- if $values.ledger.existingSecret }}
- name: LEDGER_PASSWORD_FILE
  value: {{ $dir }}/ledger-password
{{- end }}
{{- end }}
{{- if $values.teamKeys.existingSecret }}
- name: TEAM_KEYS_FILE
  value: {{ $dir }}/team-keys
{{- end }}
{{- if $values.oidc.existingSecret }}
- name: OIDC_CLIENT_SECRET_FILE
  value: {{ $dir }}/oidc-client-secret
{{- end }}
{{- include "nexus.tlsEnv" (dict "server" "oidc" "tls" $values.oidc.tls) }}
{{- end }}
{{- end -}}

{{- define "nexus.tlsEnv" -}}
{{- $server := .server -}}
{{- if .tls.existingSecret }}
- name: {{ upper $server }}_TLS_CA
  value: /etc/nexus/secrets/{{ $server }}-ca.crt
{{- if .tls.cert }}
- name: {{ upper $server }}_TLS_CERT
  value: /etc/nexus/secrets/{{ $server }}-tls.crt
- name: {{ upper $server }}_TLS_KEY
  value: /etc/nexus/secrets/{{ $server }}-tls.key
{{- end }}
{{- end }}
{{- end -}}

{{- /* The files that serversEnv names, as sources of one projected volume; empty where there are none. */ -}}
{{- define "nexus.serversFiles" -}}
{{- $values := .root.Values -}}
{{- if .nats.existingSecret }}
- secret:
    name: {{ .nats.existingSecret }}
    items:
      {{- if .nats.creds }}
      - {key: {{ .nats.creds | quote }}, path: nats-creds}
      {{- else }}
      - {key: {{ .nats.password | quote }}, path: nats-password}
      {{- end }}
{{- end }}
{{- include "nexus.tlsFiles" (dict "server" "nats" "tls" $values.nats.tls) }}
{{- if .etcd.existingSecret }}
- secret:
    name: {{ .etcd.existingSecret }}
    items:
      - {key: {{ .etcd.password | quote }}, path: etcd-password}
{{- end }}
{{- include "nexus.tlsFiles" (dict "server" "etcd" "tls" $values.etcd.tls) }}
{{- if eq .role "gateway" }}
{{- if $values.redis.existingSecret }}
- secret:
    name: {{ $values.redis.existingSecret }}
    items:
      - {key: {{ $values.redis.password | quote }}, path: redis-password}
{{- end }}
{{- include "nexus.tlsFiles" (dict "server" "redis" "tls" $values.redis.tls) }}
{{- if and $values.ledger.url $values.ledger.existingSecret }}
- secret:
    name: {{ $values.ledger.existingSecret }}
    items:
      - {key: {{ $values.ledger.password | quote }}, path: ledger-password}
{{- end }}
{{- if $values.teamKeys.existingSecret }}
- secret:
    name: {{ $values.teamKeys.existingSecret }}
    items:
      - {key: {{ $values.teamKeys.file | quote }}, path: team-keys}
{{- end }}
{{- if $values.oidc.existingSecret }}
- secret:
    name: {{ $values.oidc.existingSecret }}
    items:
      - {key: {{ $values.oidc.clientSecret | quote }}, path: oidc-client-secret}
{{- end }}
{{- include "nexus.tlsFiles" (dict "server" "oidc" "tls" $values.oidc.tls) }}
{{- end }}
{{- end -}}

{{- define "nexus.tlsFiles" -}}
{{- $server := .server -}}
{{- if .tls.existingSecret }}
- secret:
    name: {{ .tls.existingSecret }}
    items:
      - {key: {{ .tls.ca | quote }}, path: {{ $server }}-ca.crt}
      {{- if .tls.cert }}
      - {key: {{ .tls.cert | quote }}, path: {{ $server }}-tls.crt}
      - {key: {{ .tls.key | quote }}, path: {{ $server }}-tls.key}
      {{- end }}
{{- end }}
{{- end -}}

{{- /* Spread over nodes and zones, as far as possible. (dict "selector" "…") */ -}}
{{- define "nexus.spread" -}}
{{- $selector := .selector -}}
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- $selector | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "nexus.placement" -}}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" }}
{{- with get $.values $name }}
{{ $name }}: {{ if kindIs "string" . }}{{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "nexus.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}
