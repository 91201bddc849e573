//! Logs to standard error, metrics for Prometheus and, where there is one, for a collector.

use std::io::IsTerminal as _;

use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry_otlp::{MetricExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    metrics::{PeriodicReader, SdkMeterProvider},
};
use prometheus::{Encoder as _, TextEncoder};
use serde::Deserialize;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::trace::OtlpConfig;

/// How a process logs.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// Directives as `tracing-subscriber` reads them, as in `info,gateway=debug`.
    pub filter: String,
    /// One line of text or one JSON object an event.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: LogFormat::Text }
    }
}

/// The shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

/// Why telemetry cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not understood.
    #[error("log filter is not understood")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Somebody else logs already.
    #[error("a log subscriber is installed already")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
    /// The exporter does not start.
    #[error("the Prometheus exporter does not start")]
    Exporter(#[from] opentelemetry_sdk::error::OTelSdkError),
    /// The way to the collector cannot be set up.
    #[error("the collector's endpoint is not usable")]
    Collector(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Sends logs to standard error from here on. Once a process.
pub fn init_logs(config: &LogConfig) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(&config.filter)?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => {
            registry.with(layer.with_ansi(std::io::stderr().is_terminal())).try_init()?;
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init()?,
    }
    Ok(())
}

/// The metrics of one service. Not global, so that several services can live in one process.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: prometheus::Registry,
    provider: SdkMeterProvider,
}

impl Metrics {
    /// An empty set, told apart from others by the service's name.
    pub fn new(service: &'static str, otlp: &OtlpConfig) -> Result<Self, TelemetryError> {
        let registry = prometheus::Registry::new();
        let exporter =
            opentelemetry_prometheus::exporter().with_registry(registry.clone()).build()?;
        let resource = Resource::builder().with_service_name(service).build();
        let mut provider =
            SdkMeterProvider::builder().with_reader(exporter).with_resource(resource);
        if let Some(endpoint) = otlp.path("metrics") {
            let exporter = MetricExporter::builder().with_http().with_endpoint(endpoint).build()?;
            let reader = PeriodicReader::builder(exporter);
            let reader = reader.with_interval(otlp.metrics_interval.get());
            provider = provider.with_reader(reader.build());
        }
        Ok(Self { registry, provider: provider.build() })
    }

    /// Makes instruments.
    pub fn meter(&self, name: &'static str) -> Meter {
        self.provider.meter(name)
    }

    /// Everything that was measured, in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        let encoded = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        if let Err(error) = encoded {
            tracing::warn!(%error, "metrics cannot be rendered");
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::KeyValue;

    use super::*;

    #[test]
    fn what_is_counted_is_rendered() {
        let metrics = Metrics::new("example", &OtlpConfig::default()).unwrap();
        let counter = metrics.meter("example").u64_counter("tidemark.read.decisions").build();
        counter.add(3, &[KeyValue::new("decision", "local")]);
        let text = metrics.render();
        let line = text.lines().find(|line| line.starts_with("tidemark_read_decisions_total"));
        assert!(line.is_some_and(|line| line.ends_with(" 3")), "{text}");
    }
}
