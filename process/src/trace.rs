//! Traces: where the time of one request went, across processes and regions, told to a collector by OTLP.
//!
//! Spans are made by hand where something is waited for. Nothing is global, so that several services can
//! live in one process. Without a collector nothing is made, and a caller's `traceparent` goes on as it
//! came.

use std::{borrow::Cow, collections::HashMap, sync::Arc, time::SystemTime};

use opentelemetry::{
    Context, KeyValue, Value,
    propagation::TextMapPropagator as _,
    trace::{
        Span as _, SpanBuilder, SpanContext, Status, TraceContextExt as _, Tracer as _,
        TracerProvider as _,
    },
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span as Made,
    },
};
use serde::Deserialize;

use crate::{config::Period, telemetry::TelemetryError};

pub use opentelemetry::trace::SpanKind;

const TRACEPARENT: &str = "traceparent";

/// Where traces go, and metrics too.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct OtlpConfig {
    /// The collector's OTLP endpoint for HTTP, as in `http://localhost:4318`. Unset: no traces, and metrics
    /// for Prometheus only.
    pub endpoint: Option<String>,
    /// Which part of the requests that come without a trace is traced, from 0 to 1. A request that comes
    /// with one is traced when its sender does.
    pub sample_ratio: f64,
    /// Spans that wait for the collector at most; beyond, they are dropped.
    pub queue_spans_max: usize,
    /// How often metrics are sent.
    pub metrics_interval: Period,
}

impl Default for OtlpConfig {
    fn default() -> Self {
        let metrics_interval = Period::from_secs(15);
        Self { endpoint: None, sample_ratio: 0.01, queue_spans_max: 2048, metrics_interval }
    }
}

impl OtlpConfig {
    /// Where one kind of telemetry is taken.
    pub(crate) fn path(&self, kind: &str) -> Option<String> {
        let endpoint = self.endpoint.as_ref()?;
        Some(format!("{}/v1/{kind}", endpoint.trim_end_matches('/')))
    }
}

/// Makes the spans of one service. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Traces {
    made_by: Option<Arc<Maker>>,
}

#[derive(Debug)]
struct Maker {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// As configured, for the service of this name in this region.
    pub fn new(
        config: &OtlpConfig,
        service: &'static str,
        region: &str,
    ) -> Result<Self, TelemetryError> {
        let Some(endpoint) = config.path("traces") else { return Ok(Self::default()) };
        let exporter = SpanExporter::builder().with_http().with_endpoint(endpoint).build()?;
        let bounds =
            BatchConfigBuilder::default().with_max_queue_size(config.queue_spans_max).build();
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(bounds).build();
        let sampler = Sampler::TraceIdRatioBased(config.sample_ratio);
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("tidemark.region", region.to_owned()));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(sampler)))
            .with_resource(resource.build())
            .build();
        Ok(Self::of(provider))
    }

    /// With a provider made elsewhere, as tests do.
    pub fn of(provider: SdkTracerProvider) -> Self {
        let tracer = provider.tracer("tidemark");
        Self { made_by: Some(Arc::new(Maker { provider, tracer })) }
    }

    /// Begins a span under `parent`, or a trace of its own.
    pub fn span(
        &self,
        name: impl Into<Cow<'static, str>>,
        kind: SpanKind,
        parent: Option<&str>,
    ) -> Span {
        self.begin(SpanBuilder::from_name(name).with_kind(kind), parent)
    }

    /// A span that began earlier, under a parent that is traced; none when it is not.
    pub fn span_since(
        &self,
        name: &'static str,
        kind: SpanKind,
        parent: &str,
        began: SystemTime,
    ) -> Span {
        if self.made_by.is_none() || !is_sampled(parent) {
            return Span::none();
        }
        let builder = SpanBuilder::from_name(name).with_kind(kind).with_start_time(began);
        self.begin(builder, Some(parent))
    }

    fn begin(&self, builder: SpanBuilder, parent: Option<&str>) -> Span {
        let Some(maker) = &self.made_by else { return Span::none() };
        let context = match parent.and_then(parsed) {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        Span { made: Some(maker.tracer.build_with_context(builder, &context)) }
    }

    /// Sends what is left. Blocks until the collector has it or has had its time.
    pub fn end(&self) {
        if let Some(maker) = &self.made_by
            && let Err(error) = maker.provider.shutdown()
        {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// One thing that takes time. Ends when it is dropped.
#[derive(Debug)]
pub struct Span {
    made: Option<Made>,
}

impl Span {
    /// Of nothing that is traced.
    pub const fn none() -> Self {
        Self { made: None }
    }

    /// Says something about it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(made) = self.made.as_mut().filter(|made| made.is_recording()) {
            made.set_attribute(KeyValue::new(key, value));
        }
    }

    /// It did not do what it was for.
    pub fn fail(&mut self, why: &'static str) {
        if let Some(made) = &mut self.made {
            made.set_status(Status::error(why));
        }
    }

    /// What comes under it, as a W3C `traceparent`. `None` when nothing is traced here.
    pub fn traceparent(&self) -> Option<String> {
        let context = self.made.as_ref()?.span_context();
        context.is_valid().then(|| {
            let flags = context.trace_flags().to_u8() & 1;
            format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id())
        })
    }
}

fn is_sampled(traceparent: &str) -> bool {
    parsed(traceparent).is_some_and(|parent| parent.is_sampled())
}

fn parsed(traceparent: &str) -> Option<SpanContext> {
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
    Some(context.span().span_context().clone()).filter(SpanContext::is_valid)
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn traces(sampler: Sampler) -> (Traces, InMemorySpanExporter) {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .with_sampler(Sampler::ParentBased(Box::new(sampler)));
        (Traces::of(provider.build()), exporter)
    }

    #[test]
    fn a_span_continues_the_trace_of_its_parent() {
        let (traces, exporter) = traces(Sampler::AlwaysOff);
        let mut outer = traces.span("outer", SpanKind::Server, Some(PARENT));
        outer.set("http.response.status_code", 200);
        let parent = outer.traceparent().unwrap();
        let began = SystemTime::UNIX_EPOCH;
        drop(traces.span_since("inner", SpanKind::Internal, &parent, began));
        drop(outer);
        let spans = exporter.get_finished_spans().unwrap();
        let names: Vec<_> = spans.iter().map(|span| span.name.as_ref()).collect();
        assert_eq!(names, ["inner", "outer"]);
        assert!(
            spans.iter().all(|span| PARENT.contains(&span.span_context.trace_id().to_string()))
        );
        assert_eq!(spans[0].parent_span_id, spans[1].span_context.span_id());
        assert_eq!(spans[0].start_time, began);
        assert!(PARENT.contains(&spans[1].parent_span_id.to_string()));
    }

    #[test]
    fn what_its_sender_does_not_trace_is_not_traced() {
        let (traces, exporter) = traces(Sampler::AlwaysOn);
        let unsampled = PARENT.replace("-01", "-00");
        let span = traces.span("outer", SpanKind::Server, Some(&unsampled));
        assert!(span.traceparent().unwrap().ends_with("-00"));
        drop(traces.span_since("inner", SpanKind::Internal, &unsampled, SystemTime::UNIX_EPOCH));
        drop(span);
        assert!(exporter.get_finished_spans().unwrap().is_empty());
        drop(traces.span("alone", SpanKind::Server, Some("not a parent")));
        assert_eq!(exporter.get_finished_spans().unwrap().len(), 1);
    }

    #[test]
    fn without_a_collector_nothing_is_made() {
        let traces = Traces::new(&OtlpConfig::default(), "example", "eu-west").unwrap();
        assert_eq!(traces.span("outer", SpanKind::Server, Some(PARENT)).traceparent(), None);
        traces.end();
    }
}
