{{/* Combinations that the schema cannot express. */}}
{{- define "pdserve.validate" -}}
{{- if and (not .Values.redis.enabled) (not .Values.redis.external.existingSecret) }}
{{- fail "redis.enabled is false: name the Secret with the URL of a Redis in redis.external.existingSecret" }}
{{- end }}
{{- if and .Values.security.tenantsSecret (not .Values.router.adminKey.existingSecret) }}
{{- fail "security.tenantsSecret needs router.adminKey.existingSecret: what is about all tenants is for operators" }}
{{- end }}
{{- $total := 0 }}
{{- range $role, $worker := .Values.workers }}{{ $total = add $total $worker.replicas }}{{ end }}
{{- if not $total }}{{ fail "all workers have 0 replicas" }}{{ end }}
{{- with .Values.gateway }}
{{- if and .inferencePool.enabled (not .inferencePool.endpointPicker) }}
{{- fail "gateway.inferencePool.enabled needs gateway.inferencePool.endpointPicker, the Service of the endpoint picker" }}
{{- end }}
{{- if and .httpRoute.enabled (not .httpRoute.parentRefs) }}
{{- fail "gateway.httpRoute.enabled needs gateway.httpRoute.parentRefs" }}
{{- end }}
{{- end }}
{{- end }}
