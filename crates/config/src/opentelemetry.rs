//! Standard OpenTelemetry variables that set options of section `trace`:
//! <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>.
//!
//! The OpenTelemetry library reads the variables for names, headers and the timeout: `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_EXPORTER_OTLP_TIMEOUT`.

use crate::Config;

/// Applies the variables, which override the configuration file.
pub(crate) fn read(
    config: &mut Config,
    environment: &[(String, String)],
    problems: &mut Vec<String>,
) {
    let variable = |name: &str| {
        let found = environment.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.trim()).filter(|value| !value.is_empty())
    };
    let is_off = variable("OTEL_SDK_DISABLED")
        .is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || variable("OTEL_TRACES_EXPORTER").is_some_and(|exporter| exporter != "otlp");
    let trace = &mut config.trace;
    let endpoint = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
    if is_off {
        trace.endpoint = String::new();
    } else if let Some(endpoint) = endpoint {
        trace.endpoint = endpoint.to_owned();
    }
    let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"));
    if let Some(protocol) = protocol.filter(|protocol| *protocol != "grpc")
        && !trace.endpoint.is_empty()
    {
        problems.push(format!(
            "environment variable OTEL_EXPORTER_OTLP_PROTOCOL: must be grpc, is {protocol:?}"
        ));
    }
    let Some(sampler) = variable("OTEL_TRACES_SAMPLER") else { return };
    // Option trace.trust_callers decides whether the sampling decision of the parent applies.
    match sampler.strip_prefix("parentbased_").unwrap_or(sampler) {
        "always_on" => trace.sample_ratio = 1.0,
        "always_off" => trace.sample_ratio = 0.0,
        "traceidratio" => {
            let ratio = variable("OTEL_TRACES_SAMPLER_ARG").unwrap_or("1.0");
            if let Err(problem) = config.set_text("trace", "sample_ratio", ratio) {
                problems.push(format!("environment variable OTEL_TRACES_SAMPLER_ARG: {problem}"));
            }
        }
        _ => problems.push(format!(
            "environment variable OTEL_TRACES_SAMPLER: must be always_on, always_off or \
             traceidratio, also with parentbased_, is {sampler:?}"
        )),
    }
}
