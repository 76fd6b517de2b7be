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
