//! Calls between services, in one process or over the network.
//!
//! A [`Channel`] leads either to a server in this process or to one in a different process. The generated stubs call
//! both in the same way. A local call passes through the same middleware as a remote one (authentication, spans,
//! metrics), as an HTTP request whose body is empty: its message, and the message or stream of the response, are moved
//! in the extensions instead of being encoded.

use std::{
    any::Any,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use prost::Message;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming, body::Body, metadata::MetadataMap};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

/// Service that transports calls to a server.
pub type Transport = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>;

/// Future with a boxed type.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Maximum size of a message if none is set, in bytes: tonic's default.
const DEFAULT_MAX_BYTES: usize = 4 * 1024 * 1024;

/// Leads to the servers of a service.
#[derive(Clone, Debug)]
pub enum Channel {
    /// To a server in this process: messages are moved.
    Local(Transport),
    /// To servers in different processes: messages are encoded.
    Remote(Transport),
}

impl Channel {
    fn transport(&mut self) -> &mut Transport {
        match self {
            Self::Local(transport) | Self::Remote(transport) => transport,
        }
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = <Transport as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.transport().poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.transport().call(request)
    }
}

/// Message of any type that is moved in the extensions of a request or response, which must be `Clone`.
#[derive(Clone)]
struct Moved(Arc<Mutex<Option<Box<dyn Any + Send>>>>);

impl Moved {
    fn new<T: Send + 'static>(value: T) -> Self {
        Self(Arc::new(Mutex::new(Some(Box::new(value)))))
    }

    /// Returns the value; `None` if it was taken before or has a different type.
    fn take<T: 'static>(self) -> Option<T> {
        let value = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        value.downcast().ok().map(|value| *value)
    }
}

/// Returns whether a request contains its message instead of the encoded message.
pub(crate) fn is_local<B>(request: &http::Request<B>) -> bool {
    request.extensions().get::<Moved>().is_some()
}

/// Futures that end the response stream of a local call early.
#[derive(Clone, Default)]
struct Ends(Arc<Mutex<Vec<BoxFuture<Status>>>>);

/// Ends the response stream of a local call with the status of `ended` when it completes. Returns the future if the
/// response is not that of a local call: its body must then be ended.
///
/// # Errors
/// Returns `ended` if the response has no stream that was moved.
pub fn end_local<F>(response: &http::Response<Body>, ended: F) -> Result<(), F>
where
    F: Future<Output = Status> + Send + 'static,
{
    let Some(Ends(ends)) = response.extensions().get() else { return Err(ended) };
    ends.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(ended));
    Ok(())
}

/// Returns whether a response is that of a local call, whose body is empty.
#[must_use]
pub fn is_local_response(response: &http::Response<Body>) -> bool {
    response.extensions().get::<Moved>().is_some()
}

/// Maximum sizes of the messages of a stub or endpoint, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MessageLimits {
    pub(crate) received: usize,
    pub(crate) sent: usize,
}

impl Default for MessageLimits {
    fn default() -> Self {
        // tonic does not limit sent messages by default.
        Self { received: DEFAULT_MAX_BYTES, sent: usize::MAX }
    }
}

/// Checks the size that a message would have if it were encoded, as tonic does: whether a message is too large does
/// not depend on where its receiver runs.
fn check_size(message: &impl Message, limit: usize, step: &str) -> Result<(), Status> {
    let size = message.encoded_len();
    if size <= limit {
        return Ok(());
    }
    // The text of tonic.
    Err(Status::out_of_range(format!(
        "Error, {step} message length too large: found {size} bytes, the limit is: {limit} bytes"
    )))
}

/// Client of a server in this process.
#[derive(Clone, Debug)]
pub struct LocalStub {
    transport: Transport,
    pub(crate) limits: MessageLimits,
}

impl LocalStub {
    pub(crate) fn new(transport: Transport) -> Self {
        Self { transport, limits: MessageLimits::default() }
    }

    async fn call<M>(
        &mut self,
        path: &'static str,
        request: Request<M>,
    ) -> Result<http::Response<Body>, Status>
    where
        M: Message + 'static,
    {
        check_size(request.get_ref(), self.limits.sent, "encoded")?;
        let (metadata, extensions, message) = request.into_parts();
        let mut call = http::Request::new(Body::empty());
        *call.method_mut() = http::Method::POST;
        *call.uri_mut() = http::Uri::from_static(path);
        *call.version_mut() = http::Version::HTTP_2;
        *call.headers_mut() = metadata.into_headers();
        *call.extensions_mut() = extensions;
        call.extensions_mut().insert(Moved::new(message));
        let response = self.transport.ready().await?.call(call).await?;
        match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != Code::Ok => Err(status),
            _ => Ok(response),
        }
    }

    pub(crate) async fn unary<M, R>(
        &mut self,
        path: &'static str,
        request: Request<M>,
    ) -> Result<Response<R>, Status>
    where
        M: Message + 'static,
        R: Message + 'static,
    {
        let response = self.call(path, request).await?;
        let response = taken::<R>(response)?;
        check_size(response.get_ref(), self.limits.received, "decoded")?;
        Ok(response)
    }

    pub(crate) async fn server_streaming<M, R>(
        &mut self,
        path: &'static str,
        request: Request<M>,
    ) -> Result<Response<Responses<R>>, Status>
    where
        M: Message + 'static,
        R: Message + 'static,
    {
        let response = self.call(path, request).await?;
        let ends = response.extensions().get::<Ends>().cloned().unwrap_or_default();
        let ends = std::mem::take(&mut *ends.0.lock().unwrap_or_else(PoisonError::into_inner));
        let limit = self.limits.received;
        let response = taken::<BoxStream<R>>(response)?;
        Ok(response
            .map(|stream| Responses::Local(LocalResponses { stream: Some(stream), ends, limit })))
    }
}

fn taken<T: 'static>(response: http::Response<Body>) -> Result<Response<T>, Status> {
    let (mut parts, _) = response.into_parts();
    let moved = parts.extensions.remove::<Moved>();
    // Middleware that replaces a response sets a status.
    let message = moved.and_then(Moved::take).ok_or_else(|| Status::internal("no response"))?;
    Ok(Response::from_parts(MetadataMap::from_headers(parts.headers), message, parts.extensions))
}

/// Serves a unary call from this process.
pub(crate) async fn unary<B, M, R, F>(
    request: http::Request<B>,
    limits: MessageLimits,
    handle: impl FnOnce(Request<M>) -> F,
) -> Result<http::Response<Body>, Infallible>
where
    M: Message + 'static,
    R: Message + 'static,
    F: Future<Output = Result<Response<R>, Status>>,
{
    let result = match received(request, limits) {
        Ok(request) => handle(request).await,
        Err(status) => Err(status),
    };
    let result = result.and_then(|response| {
        check_size(response.get_ref(), limits.sent, "encoded")?;
        Ok(response)
    });
    Ok(result.map_or_else(Status::into_http, |response| into_http(response, |_| {})))
}

/// Serves a call with a response stream from this process.
pub(crate) async fn server_streaming<B, M, R, S, F>(
    request: http::Request<B>,
    limits: MessageLimits,
    handle: impl FnOnce(Request<M>) -> F,
) -> Result<http::Response<Body>, Infallible>
where
    M: Message + 'static,
    R: Message + 'static,
    S: Stream<Item = Result<R, Status>> + Send + 'static,
    F: Future<Output = Result<Response<S>, Status>>,
{
    let result = match received(request, limits) {
        Ok(request) => handle(request).await,
        Err(status) => Err(status),
    };
    Ok(result.map_or_else(Status::into_http, |response| {
        let response = response.map(|stream| -> BoxStream<R> {
            Box::pin(stream.map(move |item| {
                item.and_then(|message| {
                    check_size(&message, limits.sent, "encoded").map(|()| message)
                })
            }))
        });
        into_http(response, |extensions| drop(extensions.insert(Ends::default())))
    }))
}

fn received<B, M: Message + 'static>(
    request: http::Request<B>,
    limits: MessageLimits,
) -> Result<Request<M>, Status> {
    let (mut parts, _) = request.into_parts();
    let moved = parts.extensions.remove::<Moved>();
    let message: M = moved.and_then(Moved::take).ok_or_else(|| Status::internal("no message"))?;
    check_size(&message, limits.received, "decoded")?;
    let metadata = MetadataMap::from_headers(parts.headers);
    Ok(Request::from_parts(metadata, parts.extensions, message))
}

fn into_http<T: Send + 'static>(
    response: Response<T>,
    extend: impl FnOnce(&mut http::Extensions),
) -> http::Response<Body> {
    let (metadata, message, extensions) = response.into_parts();
    let mut response = http::Response::new(Body::empty());
    *response.headers_mut() = metadata.into_headers();
    *response.extensions_mut() = extensions;
    response.extensions_mut().insert(Moved::new(message));
    extend(response.extensions_mut());
    response
}

/// Response stream of a call.
pub enum Responses<T> {
    /// Of a server in this process.
    Local(LocalResponses<T>),
    /// Of a server in a different process.
    Remote(Streaming<T>),
}

/// Response stream of a server in this process.
pub struct LocalResponses<T> {
    /// `None` after the stream has ended.
    stream: Option<BoxStream<T>>,
    ends: Vec<BoxFuture<Status>>,
    limit: usize,
}

impl<T: Message + Default + 'static> Responses<T> {
    /// Returns the next message; `None` after the last.
    ///
    /// # Errors
    /// Returns the status with which the stream ended.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        self.next().await.transpose()
    }
}

impl<T: Message + 'static> LocalResponses<T> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<T, Status>>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        // First, so that a stream that always has a message ready also ends.
        for end in &mut self.ends {
            if let Poll::Ready(status) = end.as_mut().poll(context) {
                self.stream = None;
                return Poll::Ready(Some(Err(status)));
            }
        }
        let Poll::Ready(item) = stream.as_mut().poll_next(context) else { return Poll::Pending };
        let item = item.map(|item| {
            item.and_then(|message| check_size(&message, self.limit, "decoded").map(|()| message))
        });
        // As over the network, no message follows an error.
        if !matches!(item, Some(Ok(_))) {
            self.stream = None;
        }
        Poll::Ready(item)
    }
}

impl<T: Message + Default + 'static> Stream for Responses<T> {
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.get_mut() {
            Self::Local(local) => local.poll(context),
            Self::Remote(remote) => Pin::new(remote).poll_next(context),
        }
    }
}

impl<T> std::fmt::Debug for Responses<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Responses").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
