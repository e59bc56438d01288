//! An OpenTelemetry collector that keeps what it gets.

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
use tokio::{
    runtime::{self, Runtime},
    sync::watch,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// How it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It takes spans.
    Takes,
    /// It refuses them.
    Refuses,
    /// It does not answer.
    Hangs,
}

/// One exported span.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of the process.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its trace.
    pub trace_id: String,
    /// Itself.
    pub span_id: String,
    /// The span above it; empty for a root.
    pub parent_id: String,
    /// Trace and span of each link.
    pub links: Vec<(String, String)>,
    /// In nanoseconds since 1970.
    pub start: u64,
    /// In nanoseconds since 1970.
    pub end: u64,
    /// As text.
    pub attributes: BTreeMap<String, String>,
    /// It ended with an error.
    pub failed: bool,
}

impl Span {
    /// Trace and span, as links have them.
    #[must_use]
    pub fn place(&self) -> (String, String) {
        (self.trace_id.clone(), self.span_id.clone())
    }
}

/// A collector on a port of its own.
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
    answer: Answer,
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
        match self.answer {
            Answer::Takes => Ok(Response::new(ExportTraceServiceResponse::default())),
            Answer::Refuses => Err(Status::permission_denied("not here")),
            Answer::Hangs => std::future::pending().await,
        }
    }
}

impl Collector {
    /// Starts one.
    ///
    /// # Panics
    /// When there is no port.
    #[must_use]
    pub fn start(answer: Answer) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), answer)
    }

    /// Starts one at this address.
    ///
    /// # Panics
    /// When the address cannot be used.
    #[must_use]
    pub fn start_at(address: SocketAddr, answer: Answer) -> Self {
        let listener = TcpListener::bind(address).expect("the address can be used");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let address = listener.local_addr().expect("it has an address");
        let (sender, received) = watch::channel(Vec::new());
        let service = TraceServiceServer::new(Service { answer, received: Arc::new(sender) });
        // Its connections end with its runtime.
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a thread can be started");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("it is non-blocking");
            let server = tonic::transport::Server::builder().add_service(service);
            let connections = TcpListenerStream::new(listener);
            server.serve_with_incoming(connections).await.expect("it serves");
        });
        Self { address, received, runtime: Some(runtime) }
    }

    /// Ends it and its connections; returns its address.
    #[must_use]
    pub fn kill(self) -> SocketAddr {
        self.address
    }

    /// What `trace.endpoint` is set to.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The setting for it.
    #[must_use]
    pub fn setting(&self) -> String {
        format!("trace.endpoint={}", self.url())
    }

    /// Returns all spans once they are enough.
    ///
    /// # Panics
    /// When the collector ends before.
    pub async fn spans_when(&mut self, are_enough: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        loop {
            let spans = self.spans();
            if are_enough(&spans) {
                return spans;
            }
            self.received.changed().await.expect("the collector runs");
        }
    }

    /// All spans so far.
    pub fn spans(&mut self) -> Vec<Span> {
        self.received.borrow_and_update().iter().flat_map(read).collect()
    }

    /// Everything so far, as the OTLP messages that came.
    pub fn exported(&mut self) -> Vec<Vec<u8>> {
        self.received.borrow_and_update().iter().map(Message::encode_to_vec).collect()
    }
}

/// Spans whose parent, or a link, is neither among them nor in `known`.
#[must_use]
pub fn dangling(spans: &[Span], known: &[(String, String)]) -> Vec<String> {
    let mut places: BTreeSet<(String, String)> = spans.iter().map(Span::place).collect();
    places.extend(known.iter().cloned());
    let mut dangling = Vec::new();
    for span in spans {
        let parent = (span.trace_id.clone(), span.parent_id.clone());
        if !span.parent_id.is_empty() && !places.contains(&parent) {
            dangling.push(format!("parent of {span:?}"));
        }
        for link in span.links.iter().filter(|link| !places.contains(*link)) {
            dangling.push(format!("link {link:?} of {span:?}"));
        }
    }
    dangling
}

/// The traces as trees, for people: each root with what is below it, in order of start.
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
    let took = (span.end - span.start) / 1000;
    let attributes: Vec<_> =
        span.attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let service = &span.service;
    text.push_str(&format!(
        "{}{} ({service}, {took} µs) {}{}\n",
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
    for of_process in &request.resource_spans {
        let resource = of_process.resource.as_ref().map(|resource| texts(&resource.attributes));
        let service = resource.and_then(|mut texts| texts.remove("service.name"));
        for scope in &of_process.scope_spans {
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
    attributes.iter().map(|one| (one.key.clone(), text(&one.value))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
