{{/* Labels of an object; the argument is the component. */}}
{{- define "cowhand.labels" -}}
app.kubernetes.io/name: cowhand
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* Image name of {repository, tag}; arguments: root, image. */}}
{{- define "cowhand.image" -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end }}

{{/* Pod fields of everything that we run; arguments: root, uid. */}}
{{- define "cowhand.pod" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .uid }}
  runAsGroup: {{ .uid }}
  fsGroup: {{ .uid }}
  seccompProfile: {type: RuntimeDefault}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Security context of every container that we run. */}}
{{- define "cowhand.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/* Image and command of one of our processes; arguments: root, command. */}}
{{- define "cowhand.process" -}}
image: {{ include "cowhand.image" (dict "root" .root "image" .root.Values.image) }}
imagePullPolicy: {{ .root.Values.imagePullPolicy }}
args: [{{ .command }}]
{{ include "cowhand.container" . }}
{{- end }}

{{- define "cowhand.tenants" -}}
{{- .Values.tenants | sortAlpha | join "," -}}
{{- end }}

{{- define "cowhand.brokerURL" -}}
{{- printf "https://cowhand-broker.%s.svc:8443" .Release.Namespace -}}
{{- end }}

{{/* Environment of a process that asks the archive itself. */}}
{{- define "cowhand.archiveEnv" -}}
{{- if .Values.archive.enabled }}
- {name: COWHAND_ARCHIVE_URL, value: {{ printf "https://cowhand-archive.%s.svc:8443" .Release.Namespace | quote }}}
{{- end }}
{{- end }}

{{- define "cowhand.archiveMount" -}}
{{- if .Values.archive.enabled }}
- {name: archive-token, mountPath: /var/run/secrets/cowhand-archive, readOnly: true}
{{- end }}
{{- end }}

{{/* The token with which the archive is asked. */}}
{{- define "cowhand.archiveVolume" -}}
{{- if .Values.archive.enabled }}
- name: archive-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {audience: cowhand-archive, expirationSeconds: 600, path: token}
{{- end }}
{{- end }}

{{- define "cowhand.storeURL" -}}
{{- if .Values.store.embedded -}}
{{- printf "rediss://cowhand-store.%s.svc:6379/0" .Release.Namespace -}}
{{- else -}}
{{- required "store.external.url must be set when store.embedded is false" .Values.store.external.url -}}
{{- end -}}
{{- end }}

{{- define "cowhand.storeCA" -}}
{{- if .Values.store.embedded }}cowhand-ca{{ else }}{{ .Values.store.external.caConfigMap }}{{ end -}}
{{- end }}

{{/* Environment that reaches the store; arguments: root, user. */}}
{{- define "cowhand.storeEnv" -}}
- {name: COWHAND_STORE_URL, value: {{ include "cowhand.storeURL" .root | quote }}}
- {name: COWHAND_STORE_USERNAME, value: {{ .user | quote }}}
- {name: COWHAND_STORE_PASSWORD_FILE, value: /etc/cowhand/store/password}
- {name: COWHAND_STORE_CA_FILE, value: /etc/cowhand/store-ca/ca.crt}
{{- if and (not .root.Values.store.embedded) (contains "+sentinel://" .root.Values.store.external.url) }}
- {name: COWHAND_STORE_SENTINEL_USERNAME_FILE, value: /etc/cowhand/store-sentinel/username}
- {name: COWHAND_STORE_SENTINEL_PASSWORD_FILE, value: /etc/cowhand/store-sentinel/password}
{{- end }}
- {name: COWHAND_STORE_PARTITIONS, value: {{ .root.Values.store.partitions | quote }}}
- {name: COWHAND_STORE_PROFILE, value: {{ .root.Values.store.profile | quote }}}
- {name: COWHAND_STORE_REPLICAS, value: {{ ternary 0 .root.Values.store.replicas (and .root.Values.store.embedded (eq .root.Values.store.profile "strict")) | quote }}}
- {name: COWHAND_STORE_ALLOW_WEAKER, value: {{ .root.Values.store.allowWeaker | quote }}}
{{- end }}

{{/* Environment that opens the metrics port. */}}
{{- define "cowhand.metricsEnv" -}}
- {name: COWHAND_METRICS_PORT, value: {{ ternary .Values.metrics.port 0 .Values.metrics.enabled | quote }}}
{{- end }}

{{/* The metrics port of a container. */}}
{{- define "cowhand.metricsPort" -}}
{{- if .Values.metrics.enabled }}
- {name: metrics, containerPort: {{ .Values.metrics.port }}}
{{- end }}
{{- end }}

{{/* Ingress rule for the metrics: pods of the release's namespace, and those of metrics.from. */}}
{{- define "cowhand.metricsIngress" -}}
{{- if .Values.metrics.enabled }}
- ports: [{protocol: TCP, port: {{ .Values.metrics.port }}}]
  from:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace }}}
    {{- with .Values.metrics.from }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- end }}

{{- define "cowhand.storeMounts" -}}
- {name: store-login, mountPath: /etc/cowhand/store, readOnly: true}
- {name: store-ca, mountPath: /etc/cowhand/store-ca, readOnly: true}
{{- if and (not .Values.store.embedded) (contains "+sentinel://" .Values.store.external.url) }}
- {name: store-sentinel, mountPath: /etc/cowhand/store-sentinel, readOnly: true}
{{- end }}
{{- end }}

{{/* Volumes of the store's login and CA; arguments: root, secret. */}}
{{- define "cowhand.storeVolumes" -}}
- name: store-login
  secret: {secretName: {{ .secret }}, defaultMode: 0440, items: [{key: password, path: password}]}
- name: store-ca
  configMap: {name: {{ include "cowhand.storeCA" .root }}}
{{- if and (not .root.Values.store.embedded) (contains "+sentinel://" .root.Values.store.external.url) }}
- name: store-sentinel
  secret: {secretName: cowhand-store-sentinel, optional: true, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "cowhand.brokerTokenVolume" -}}
- name: broker-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {audience: cowhand-broker, expirationSeconds: 600, path: token}
{{- end }}

{{/* Probes of a process that writes /run/cowhand/ready. */}}
{{- define "cowhand.readyProbes" -}}
startupProbe:
  exec: {command: [test, -f, /run/cowhand/ready]}
  periodSeconds: 1
  failureThreshold: 300
readinessProbe:
  exec: {command: [test, -f, /run/cowhand/ready]}
  periodSeconds: 5
{{- end }}

{{/* Probes of a process that serves TLS on 8443. */}}
{{- define "cowhand.httpProbes" -}}
startupProbe:
  httpGet: {path: /healthz, port: https, scheme: HTTPS}
  periodSeconds: 1
  failureThreshold: 300
readinessProbe:
  httpGet: {path: /healthz, port: https, scheme: HTTPS}
  periodSeconds: 5
livenessProbe:
  httpGet: {path: /healthz, port: https, scheme: HTTPS}
  periodSeconds: 20
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* Egress rule for cluster DNS; the address is that of NodeLocal DNSCache. */}}
{{- define "cowhand.dns" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
  to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: kube-system}
    - ipBlock: {cidr: 169.254.20.10/32}
{{- end }}
