{{- define "outbox.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels that select the pods of a component: (dict "root" $ "component" NAME). */}}
{{- define "outbox.selector" -}}
app.kubernetes.io/name: outbox
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "outbox.ownLabels" -}}
{{ include "outbox.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* The labels of a resource. No value replaces those that the chart needs. */}}
{{- define "outbox.labels" -}}
{{ merge (include "outbox.ownLabels" . | fromYaml) (.root.Values.commonLabels | default dict) | toYaml }}
{{- end -}}

{{/* The same with labels of its own: (dict "root" $ "component" NAME "own" LABELS). */}}
{{- define "outbox.moreLabels" -}}
{{ merge (include "outbox.ownLabels" . | fromYaml) (.own | default dict) (.root.Values.commonLabels | default dict) | toYaml }}
{{- end -}}

{{/* The values of a component: of a service, or of all jobs. */}}
{{- define "outbox.values" -}}
{{ (hasKey .root.Values .component) | ternary (get .root.Values .component) .root.Values.jobs | toYaml }}
{{- end -}}

{{- define "outbox.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "outbox.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "outbox.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* Refuses values that are wrong together. */}}
{{- define "outbox.check" -}}
{{- if not .Values.secrets.existingSecret -}}
{{- fail "secrets.existingSecret: name the Secret with the URLs of PostgreSQL and Redis" -}}
{{- end -}}
{{- if and (not .Values.tls.existingSecret) (not .Values.tls.plaintext) -}}
{{- fail "tls.existingSecret: name a Secret of type kubernetes.io/tls, or set tls.plaintext=true if a mesh encrypts" -}}
{{- end -}}
{{- if and .Values.tls.existingSecret .Values.tls.plaintext -}}
{{- fail "tls.plaintext: true, but tls.existingSecret is set; choose one of them" -}}
{{- end -}}
{{- if and .Values.tls.clientCaKey (not .Values.tls.existingSecret) -}}
{{- fail "tls.clientCaKey: client certificates require TLS; set tls.existingSecret too" -}}
{{- end -}}
{{- range $component := list "scheduler" "dispatcher" "stats" "gateway" -}}
{{- with (get $.Values $component).autoscaling -}}
{{- if and .enabled (lt (int .maxReplicas) (int .minReplicas)) -}}
{{- fail (printf "%s.autoscaling.maxReplicas: %d is below minReplicas, %d" $component (int .maxReplicas) (int .minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.dispatcher.autoscaling -}}
{{- if and (ne .lateness.source "none") (not .enabled) -}}
{{- fail (printf "dispatcher.autoscaling.lateness.source: %s, but dispatcher.autoscaling.enabled is false" .lateness.source) -}}
{{- end -}}
{{- if and (ne .lateness.source "none") (not $.Values.metrics.enabled) -}}
{{- fail (printf "dispatcher.autoscaling.lateness.source: %s needs metrics.enabled" .lateness.source) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "podMonitor" "prometheusRule" "dashboard" -}}
{{- if and (get $.Values.metrics $name).enabled (not $.Values.metrics.enabled) -}}
{{- fail (printf "metrics.%s.enabled: true, but metrics.enabled is false" $name) -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway -}}
{{- if .enabled -}}
{{- if and .tls.existingSecret .tls.plaintext -}}
{{- fail "gateway.tls.plaintext: true, but gateway.tls.existingSecret is set; choose one of them" -}}
{{- end -}}
{{- if and .tls.clientCaKey (not (include "outbox.gatewayCertificate" $)) -}}
{{- fail "gateway.tls.clientCaKey: client certificates require TLS; set gateway.tls.existingSecret too" -}}
{{- end -}}
{{- if and $.Values.tls.clientCaKey (not .services.clientSecret) -}}
{{- fail "gateway.services.clientSecret: the services require client certificates (tls.clientCaKey); name a Secret of type kubernetes.io/tls" -}}
{{- end -}}
{{- if and $.Values.tls.plaintext .services.clientSecret -}}
{{- fail "gateway.services.clientSecret: the services have no TLS (tls.plaintext); leave it empty" -}}
{{- end -}}
{{- if and .service.externalTrafficPolicy (eq .service.type "ClusterIP") -}}
{{- fail "gateway.service.externalTrafficPolicy: only for the types NodePort and LoadBalancer (gateway.service.type)" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The Secret with the gateway's certificate for its clients; empty: it serves plain HTTP. */}}
{{- define "outbox.gatewayCertificate" -}}
{{- if not .Values.gateway.tls.plaintext -}}
{{- .Values.gateway.tls.existingSecret | default .Values.tls.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* What changes when the Secret does: its content, if it can be read, and the text of the values. */}}
{{- define "outbox.secretChecksum" -}}
{{- $found := lookup "v1" "Secret" .Release.Namespace .Values.secrets.existingSecret | default dict -}}
{{- printf "%s %s" (toJson (get $found "data")) .Values.secrets.revision | sha256sum -}}
{{- end -}}

{{/* The security context of every pod. */}}
{{- define "outbox.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- range $name, $id := .Values.podSecurityContext }}
  {{- if not (kindIs "invalid" $id) }}
  {{ $name }}: {{ int64 $id }}
  {{- end }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* The security context of every container. */}}
{{- define "outbox.containerSecurity" -}}
image: {{ include "outbox.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* The variables of secrets: (dict "root" $ "secrets" (list "databaseUrl" ...)). */}}
{{- define "outbox.secretVariables" -}}
{{- $secrets := .root.Values.secrets -}}
{{- range .secrets -}}
{{- $key := get $secrets.keys . -}}
{{- if $key }}
{{- $setting := ternary "databaseUrl" . (eq . "migrationDatabaseUrl") }}
{{- $variable := printf "OUTBOX_%s" (snakecase $setting | upper) }}
{{- if eq $secrets.delivery "files" }}
- name: {{ $variable }}_FILE
  value: /run/secrets/outbox/{{ $key }}
{{- else }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ $secrets.existingSecret }}
      key: {{ $key }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The volume of the same secrets, and the volume of the CAs. */}}
{{- define "outbox.secretVolumes" -}}
{{- $secrets := .root.Values.secrets -}}
{{- if eq $secrets.delivery "files" }}
- name: secrets
  secret:
    secretName: {{ $secrets.existingSecret }}
    defaultMode: 0440
    items:
    {{- range .secrets }}
    {{- with get $secrets.keys . }}
      - key: {{ . }}
        path: {{ . }}
    {{- end }}
    {{- end }}
{{- end }}
{{- with .root.Values.caConfigMap }}
- name: ca
  configMap:
    name: {{ . }}
{{- end }}
{{- end -}}

{{- define "outbox.secretMounts" -}}
{{- if eq .root.Values.secrets.delivery "files" }}
- name: secrets
  mountPath: /run/secrets/outbox
  readOnly: true
{{- end }}
{{- if .root.Values.caConfigMap }}
- name: ca
  mountPath: /etc/outbox/ca
  readOnly: true
{{- end }}
{{- end -}}

{{/* Where the pods of a component run: (dict "root" $ "component" NAME). */}}
{{- define "outbox.placement" -}}
{{- $root := .root -}}
{{- $values := include "outbox.values" . | fromYaml -}}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with ternary $root.Values.topologyKeys list (hasKey $root.Values .component) }}
topologySpreadConstraints:
  {{- range . }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "outbox.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The rule of a NetworkPolicy that allows DNS: the values networkPolicy. */}}
{{- define "outbox.dnsEgress" -}}
# DNS
- ports:
    {{- range .dns.ports }}
    - {protocol: UDP, port: {{ . }}}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .dns.to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
