//! One trace through three regions, as a collector of OTLP gets it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use compose::demo::caller::Caller;
use compose::local::{Plan, Stack};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;
use serde_json::json;
use tokio::net::TcpListener;

use crate::stack::place;
use crate::topology::eventually;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[derive(Debug, Clone)]
struct Span {
    region: String,
    name: String,
    id: Vec<u8>,
    parent: Vec<u8>,
}

/// Keeps the spans of the one trace.
#[derive(Debug, Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    /// Listens, and returns its endpoint.
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let collector = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let collector = collector.clone();
                let take = service_fn(move |request| collector.clone().take(request));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), take),
                );
            }
        });
        endpoint
    }

    async fn take(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        if request.uri().path() == "/v1/traces" {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let sent = ExportTraceServiceRequest::decode(body).unwrap();
            for of_resource in sent.resource_spans {
                let region = region_of(of_resource.resource.as_ref());
                let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                let ours = spans.filter(|span| hex(&span.trace_id) == TRACE);
                self.spans.lock().unwrap().extend(ours.map(|span| Span {
                    region: region.clone(),
                    name: span.name,
                    id: span.span_id,
                    parent: span.parent_span_id,
                }));
            }
        }
        Ok(Response::new(Full::default()))
    }

    fn find(&self, region: &str, name: &str) -> Option<Span> {
        let spans = self.spans.lock().unwrap();
        spans.iter().find(|span| span.region == region && span.name == name).cloned()
    }
}

fn region_of(resource: Option<&Resource>) -> String {
    let attributes = resource.map(|resource| resource.attributes.as_slice()).unwrap_or_default();
    let region = attributes.iter().find(|attribute| attribute.key == "tidemark.region");
    match region.and_then(|region| region.value.clone()?.value) {
        Some(Any::StringValue(region)) => region,
        other => panic!("a resource without a region: {other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn one_trace_shows_a_write_in_europe_become_readable_in_asia() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let setting = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let environment = vec![
        setting("GATEWAY__OTLP__ENDPOINT", &endpoint),
        setting("PROJECTOR__OTLP__ENDPOINT", &endpoint),
        setting("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    let plan = Plan { environment, ..Plan::default() };
    let stack = Box::pin(Stack::start(plan)).await.unwrap();
    let url = |region: &str| stack.region(region).unwrap().url.clone();
    let mut europe = Caller::new(url("eu-west")).unwrap();
    let path = place(&mut europe, "o-traced").await;

    let http = reqwest::Client::new();
    let traceparent = format!("00-{TRACE}-b7ad6b7169203331-01");
    // The event is 100 ms on its way; a machine that is slow enough may not see the reader wait for it.
    for quantity in 1..=10 {
        let item = json!({"order_id": "o-traced", "product_id": "product-of-o-traced", "quantity": quantity});
        let written = http.post(format!("{}/v1/commands/AddItem", url("eu-west"))).json(&item);
        let written = written.header("traceparent", &traceparent).send().await.unwrap();
        assert_eq!(written.status(), 200, "{written:?}");
        let read = http.get(format!("{}{path}", url("asia-south")));
        let read = read.header("consistency-token", written.headers()["consistency-token"].clone());
        let read = read.header("consistency-policy", "wait;ms=20000");
        let read = read.header("traceparent", &traceparent).send().await.unwrap();
        assert_eq!(read.status(), 200, "{read:?}");
        if read.headers()["consistency-status"].to_str().unwrap().starts_with("waited") {
            break;
        }
    }

    let command = "/v1/commands/{command}";
    let row = "/v1/views/{view}/{key}";
    let steps = [
        ("eu-west", command),
        ("eu-west", "forward"),
        ("us-east", command),
        ("us-east", "append"),
        ("us-east", "project"),
        ("eu-west", "project"),
        ("asia-south", "project"),
        ("asia-south", row),
        ("asia-south", "wait"),
    ];
    eventually("all spans have arrived", async || {
        steps.iter().all(|(region, name)| collector.find(region, name).is_some())
    })
    .await;
    let span = |region, name| collector.find(region, name).unwrap();
    let under = [
        (span("eu-west", command), "b7ad6b7169203331".to_owned()),
        (span("eu-west", "forward"), hex(&span("eu-west", command).id)),
        (span("us-east", command), hex(&span("eu-west", "forward").id)),
        (span("us-east", "append"), hex(&span("us-east", command).id)),
        (span("asia-south", "project"), hex(&span("us-east", "append").id)),
        (span("asia-south", row), "b7ad6b7169203331".to_owned()),
    ];
    for (span, parent) in under {
        assert_eq!(hex(&span.parent), parent, "{span:?}");
    }
    stack.stop().await.unwrap();
}
