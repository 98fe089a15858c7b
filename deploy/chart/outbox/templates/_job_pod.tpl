{{/* The spec of a job that runs one command: (dict "root" $ "component" NAME "resources" VALUES
     "args" LIST "secrets" LIST "operatorKey" BOOLEAN). Hooks run before the chart's own ServiceAccount
     and ConfigMap exist, so they use neither. */}}
{{- define "outbox.jobPod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "outbox.moreLabels" (dict "root" $root "component" .component "own" $root.Values.jobs.podLabels) | nindent 4 }}
  {{- with $root.Values.jobs.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  {{- include "outbox.podSecurity" $root | nindent 2 }}
  {{- include "outbox.placement" . | nindent 2 }}
  containers:
    - name: {{ .component }}
      {{- include "outbox.containerSecurity" $root | nindent 6 }}
      args: {{ toJson .args }}
      env:
        {{- include "outbox.secretVariables" . | trim | nindent 8 }}
        {{- if .operatorKey }}
        - name: OUTBOX_API_KEY_FILE
          value: /run/secrets/operator/{{ $root.Values.operatorKey.key }}
        {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      volumeMounts:
        {{- include "outbox.secretMounts" . | trim | nindent 8 }}
        {{- if .operatorKey }}
        - name: operator-key
          mountPath: /run/secrets/operator
          readOnly: true
        {{- end }}
  volumes:
    {{- include "outbox.secretVolumes" . | trim | nindent 4 }}
    {{- if .operatorKey }}
    - name: operator-key
      secret:
        secretName: {{ $root.Values.operatorKey.existingSecret }}
        defaultMode: 0440
        items:
          - key: {{ $root.Values.operatorKey.key }}
            path: {{ $root.Values.operatorKey.key }}
    {{- end }}
{{- end -}}
