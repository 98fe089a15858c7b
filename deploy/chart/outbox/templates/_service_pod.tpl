{{/* The pod template of a service: (dict "root" $ "component" NAME "port" NUMBER "secrets" LIST). */}}
{{- define "outbox.servicePod" -}}
{{- $root := .root -}}
{{- $values := get $root.Values .component -}}
metadata:
  labels:
    {{- include "outbox.moreLabels" (dict "root" $root "component" .component "own" $values.podLabels) | nindent 4 }}
  annotations:
    checksum/config: {{ include (print $root.Template.BasePath "/configmap.yaml") $root | sha256sum }}
    checksum/secrets: {{ include "outbox.secretChecksum" $root }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "outbox.serviceAccountName" $root }}
  {{- include "outbox.podSecurity" $root | nindent 2 }}
  terminationGracePeriodSeconds: {{ add $root.Values.shutdownGraceSeconds 15 }}
  {{- include "outbox.placement" . | nindent 2 }}
  containers:
    - name: {{ .component }}
      {{- include "outbox.containerSecurity" $root | nindent 6 }}
      args: [{{ .component }}]
      envFrom:
        - configMapRef:
            name: {{ include "outbox.fullname" $root }}
      env:
        {{- include "outbox.secretVariables" . | trim | nindent 8 }}
        {{- with $root.Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: grpc
          containerPort: {{ .port }}
        - name: health
          containerPort: 50060
        {{- if $root.Values.metrics.enabled }}
        - name: metrics
          containerPort: 9090
        {{- end }}
      {{- if ne .component "dispatcher" }}
      # An idle service ends within a second of SIGTERM. First let the nodes learn that no new
      # connection may go to this pod. Nobody reaches a dispatcher by a shared address.
      lifecycle:
        preStop:
          exec:
            command: [sleep, "5"]
      {{- end }}
      # The start takes seconds: Python and its libraries are loaded.
      startupProbe:
        grpc: {port: 50060, service: liveness}
        periodSeconds: 1
        timeoutSeconds: 1
        failureThreshold: 60
      # Depends on no store: a restart would not bring PostgreSQL back.
      livenessProbe:
        grpc: {port: 50060, service: liveness}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      readinessProbe:
        grpc: {port: 50060, service: readiness}
        periodSeconds: 5
        timeoutSeconds: 2
        failureThreshold: 2
      resources:
        {{- toYaml $values.resources | nindent 8 }}
      volumeMounts:
        {{- include "outbox.secretMounts" . | trim | nindent 8 }}
        {{- if $root.Values.tls.existingSecret }}
        - name: tls
          mountPath: /etc/outbox/tls
          readOnly: true
        {{- end }}
        {{- if $root.Values.replyRules }}
        - name: reply-rules
          mountPath: /etc/outbox/reply-rules
          readOnly: true
        {{- end }}
        {{- if $values.temporarySpace }}
        - name: tmp
          mountPath: /var/tmp
        {{- end }}
  volumes:
    {{- include "outbox.secretVolumes" . | trim | nindent 4 }}
    {{- with $root.Values.tls.existingSecret }}
    - name: tls
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- if $root.Values.replyRules }}
    - name: reply-rules
      configMap:
        name: {{ include "outbox.fullname" $root }}-reply-rules
    {{- end }}
    {{- with $values.temporarySpace }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ . }}
    {{- end }}
{{- end -}}
