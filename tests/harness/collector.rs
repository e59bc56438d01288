//! An OpenTelemetry collector that stores the spans that it receives.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::Span as ProtoSpan,
};
use prost::Message;
use streamer_core::hex;
use tokio::{
    runtime::{self, Runtime},
    sync::watch,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// How the collector responds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// Accepts spans.
    Accept,
    /// Rejects spans.
    Reject,
    /// Does not respond.
    Hang,
}

/// One exported span.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of the process.
    pub service: String,
    /// Name of the span.
    pub name: String,
    /// ID of the trace.
    pub trace_id: String,
    /// ID of the span.
    pub span_id: String,
    /// ID of the parent span; empty for a root span.
    pub parent_id: String,
    /// Trace ID and span ID of each link.
    pub links: Vec<(String, String)>,
    /// Start time, in nanoseconds since the Unix epoch.
    pub start: u64,
    /// End time, in nanoseconds since the Unix epoch.
    pub end: u64,
    /// Attributes by name, with their values as text.
    pub attributes: BTreeMap<String, String>,
    /// Whether the span ended with an error.
    pub failed: bool,
}

impl Span {
    /// Returns the trace ID and the span ID, as in links.
    #[must_use]
    pub fn context(&self) -> (String, String) {
        (self.trace_id.clone(), self.span_id.clone())
    }
}

/// A collector on a separate port.
pub struct Collector {
    address: SocketAddr,
    received: watch::Receiver<Vec<ExportTraceServiceRequest>>,
    runtime: Option<Runtime>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Service {
    behavior: Behavior,
    received: Arc<watch::Sender<Vec<ExportTraceServiceRequest>>>,
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let request = request.into_inner();
        self.received.send_modify(|received| received.push(request));
        match self.behavior {
            Behavior::Accept => Ok(Response::new(ExportTraceServiceResponse::default())),
            Behavior::Reject => Err(Status::permission_denied("rejected by the test")),
            Behavior::Hang => std::future::pending().await,
        }
    }
}

impl Collector {
    /// Starts a collector on a free port.
    ///
    /// # Panics
    /// Panics if no port is free.
    #[must_use]
    pub fn start(behavior: Behavior) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), behavior)
    }

    /// Starts a collector on the given address.
    ///
    /// # Panics
    /// Panics if the address cannot be bound.
    #[must_use]
    pub fn start_at(address: SocketAddr, behavior: Behavior) -> Self {
        let listener = TcpListener::bind(address).expect("the address can be bound");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let address = listener.local_addr().expect("the listener is bound");
        let (sender, received) = watch::channel(Vec::new());
        let service = TraceServiceServer::new(Service { behavior, received: Arc::new(sender) });
        // Shutting down the runtime closes the connections.
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a thread can be started");
        runtime.spawn(async move {
            let listener =
                tokio::net::TcpListener::from_std(listener).expect("the listener is non-blocking");
            let server = tonic::transport::Server::builder().add_service(service);
            let connections = TcpListenerStream::new(listener);
            server.serve_with_incoming(connections).await.expect("the collector serves");
        });
        Self { address, received, runtime: Some(runtime) }
    }

    /// Stops the collector and closes its connections; returns its address.
    #[must_use]
    pub fn kill(self) -> SocketAddr {
        self.address
    }

    /// Returns the value for option `trace.endpoint`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the setting with which a server exports spans to this collector.
    #[must_use]
    pub fn setting(&self) -> String {
        format!("trace.endpoint={}", self.url())
    }

    /// Waits until the received spans satisfy `condition`; returns all received spans.
    ///
    /// # Panics
    /// Panics if the collector stops before that.
    pub async fn wait_for_spans(&mut self, condition: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        loop {
            let spans = self.spans();
            if condition(&spans) {
                return spans;
            }
            self.received.changed().await.expect("the collector runs");
        }
    }

    /// Returns all spans received so far.
    pub fn spans(&mut self) -> Vec<Span> {
        self.received.borrow_and_update().iter().flat_map(read).collect()
    }

    /// Returns the OTLP messages received so far.
    pub fn exported(&mut self) -> Vec<Vec<u8>> {
        self.received.borrow_and_update().iter().map(Message::encode_to_vec).collect()
    }
}

/// Describes the parents and links that are neither in `spans` nor in `known`.
#[must_use]
pub fn dangling(spans: &[Span], known: &[(String, String)]) -> Vec<String> {
    let mut contexts: BTreeSet<(String, String)> = spans.iter().map(Span::context).collect();
    contexts.extend(known.iter().cloned());
    let mut dangling = Vec::new();
    for span in spans {
        let parent = (span.trace_id.clone(), span.parent_id.clone());
        if !span.parent_id.is_empty() && !contexts.contains(&parent) {
            dangling.push(format!("parent of {span:?}"));
        }
        for link in span.links.iter().filter(|link| !contexts.contains(*link)) {
            dangling.push(format!("link {link:?} of {span:?}"));
        }
    }
    dangling
}

/// Formats traces as trees for failure messages: each root with its descendants, ordered by start time.
#[must_use]
pub fn tree(spans: &[Span]) -> String {
    let mut text = String::new();
    let mut roots: Vec<_> =
        spans.iter().filter(|span| !spans.iter().any(|other| is_parent(other, span))).collect();
    roots.sort_by_key(|span| span.start);
    for root in roots {
        text.push_str(&format!("trace {}\n", root.trace_id));
        add(&mut text, spans, root, 1);
    }
    text
}

fn is_parent(parent: &Span, child: &Span) -> bool {
    parent.trace_id == child.trace_id && parent.span_id == child.parent_id
}

fn add(text: &mut String, spans: &[Span], span: &Span, depth: usize) {
    let duration = (span.end - span.start) / 1000;
    let attributes: Vec<_> =
        span.attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let service = &span.service;
    text.push_str(&format!(
        "{}{} ({service}, {duration} µs) {}{}\n",
        "  ".repeat(depth),
        span.name,
        attributes.join(" "),
        span.links.iter().map(|(trace, _)| format!(" link:{}", &trace[..8])).collect::<String>(),
    ));
    let mut children: Vec<_> = spans.iter().filter(|child| is_parent(span, child)).collect();
    children.sort_by_key(|child| child.start);
    for child in children {
        add(text, spans, child, depth + 1);
    }
}

fn read(request: &ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for process in &request.resource_spans {
        let resource = process.resource.as_ref().map(|resource| texts(&resource.attributes));
        let service = resource.and_then(|mut texts| texts.remove("service.name"));
        for scope in &process.scope_spans {
            let service = service.clone().unwrap_or_default();
            spans.extend(scope.spans.iter().map(|span| read_span(&service, span)));
        }
    }
    spans
}

fn read_span(service: &str, span: &ProtoSpan) -> Span {
    Span {
        service: service.to_owned(),
        name: span.name.clone(),
        trace_id: hex(&span.trace_id),
        span_id: hex(&span.span_id),
        parent_id: hex(&span.parent_span_id),
        links: span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
        attributes: texts(&span.attributes),
        failed: span.status.as_ref().is_some_and(|status| status.code == 2),
    }
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Option<AnyValue>| match value.as_ref().and_then(|v| v.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(value)) => value.to_string(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(&attribute.value))).collect()
}
