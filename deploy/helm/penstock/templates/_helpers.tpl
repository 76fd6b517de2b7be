{{- define "penstock.labels" -}}
app.kubernetes.io/name: penstock
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "penstock.name" -}}
{{ printf "%s-%s" .root.Release.Name .component | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* Not root, no rights, and a file system that nothing is written to. fsGroup: files of the Secret are root's, at 440. */}}
{{- define "penstock.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
{{- end }}

{{- define "penstock.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "penstock.volumes" -}}
- name: secrets
  secret: {secretName: {{ .Values.secretName }}, defaultMode: 0440}
- name: tmp
  emptyDir: {}
{{- if .Values.model.volume }}
- name: models
  {{- toYaml .Values.model.volume | nindent 2 }}
{{- end }}
{{- end }}

{{- define "penstock.mounts" -}}
- {name: secrets, mountPath: /etc/penstock/secrets, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.model.volume }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* Flags of an engine that say where the pool is. */}}
{{- define "penstock.poolFlags" -}}
{{- if .Values.pool.addresses }}
{{- range .Values.pool.addresses }}
- --pool
- {{ . | quote }}
{{- end }}
{{- else if .Values.pool.enabled }}
{{- if .Values.pool.hostNetwork }}
{{- fail "pool.addresses is empty; with pool.hostNetwork it is HOST:PORT of every pool node" }}
{{- end }}
- --pool
- {{ printf "%s:%v" (include "penstock.name" (dict "root" . "component" "pool")) .Values.pool.port | quote }}
{{- end }}
- --secret-file
- /etc/penstock/secrets/secret
{{- if .Values.poolKey }}
- --pool-key-file
- /etc/penstock/secrets/poolKey
{{- end }}
{{- end }}

{{/* How many processes a pool node has: each has a port of its own. */}}
{{- define "penstock.poolProcesses" -}}
{{- $processes := int .Values.pool.processes }}
{{- if or (lt $processes 1) (ne (toString .Values.pool.processes) (toString $processes)) }}
{{- fail (printf "pool.processes is %v; allowed: a number, as each process has a port" .Values.pool.processes) }}
{{- end }}
{{- range .Values.pool.args }}
{{- if hasPrefix "--processes" . }}
{{- fail "pool.args has --processes; allowed: pool.processes, as each process has a port" }}
{{- end }}
{{- end }}
{{- $last := sub $processes 1 }}
{{- if and .Values.pool.metricsPort (le (add .Values.pool.port 0) (add .Values.pool.metricsPort $last)) (le (add .Values.pool.metricsPort 0) (add .Values.pool.port $last)) }}
{{- fail (printf "pool.port is %v and pool.metricsPort %v; allowed: %d ports in a row for each, none for both" .Values.pool.port .Values.pool.metricsPort $processes) }}
{{- end }}
{{- $processes }}
{{- end }}

{{/* The end of the name of a process's port: none for the first. */}}
{{- define "penstock.nth" -}}
{{- if . }}-{{ . }}{{ end }}
{{- end }}
