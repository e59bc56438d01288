//! Response bodies that can be ended early with a status.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Response};
use http_body_util::{BodyStream, StreamBody};
use hyper::body::{Body as HttpBody, Frame};
use streamer_proto::seam::end_local;
use tonic::{Status, body::Body};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Forwards the frames of a response body until `ended` completes, and then ends the body with the status from
/// `ended`, in trailers: the client receives the reason and can resume the watch. A body that always has a frame
/// ready also ends.
pub fn end_when<B>(body: B, ended: impl Future<Output = Status> + Send + 'static) -> Body
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    // In a Trailers-Only response, the status is in the headers, and the stream must end with the headers.
    if body.is_end_stream() {
        return Body::new(body);
    }
    let frames = Box::pin(BodyStream::new(body));
    let state = Some((frames, Box::pin(ended)));
    let stream = stream::unfold(state, move |state| async move {
        let (mut frames, mut ended) = state?;
        tokio::select! {
            biased;
            status = &mut ended => {
                let mut trailers = HeaderMap::new();
                let added = status.add_header(&mut trailers);
                let frame = added.map(|()| Frame::trailers(trailers)).map_err(BoxError::from);
                Some((frame, None))
            }
            frame = frames.next() => {
                let frame = frame?.map_err(Into::into);
                Some((frame, Some((frames, ended))))
            }
        }
    });
    Body::new(StreamBody::new(stream))
}

/// Ends the stream of a response when `ended` completes, with its status. See [`end_when`].
pub fn end_response_when(
    response: Response<Body>,
    ended: impl Future<Output = Status> + Send + 'static,
) -> Response<Body> {
    match end_local(&response, ended) {
        Ok(()) => response,
        Err(ended) => response.map(|body| end_when(body, ended)),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::sync::{mpsc, oneshot};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    #[tokio::test]
    async fn a_response_without_a_body_is_unchanged() {
        let response = Status::not_found("no such request").into_http::<Body>();
        let response = response.map(|body| end_when(body, std::future::pending()));
        assert!(response.body().is_end_stream());
        assert_eq!(response.headers()["grpc-status"], "5");
    }

    #[tokio::test]
    async fn a_body_that_always_has_a_frame_ready_ends() {
        let frames = std::iter::repeat_with(|| Ok::<_, BoxError>(Frame::data("x".into())));
        let busy = StreamBody::new(tokio_stream::iter(frames));
        let (end, ended) = oneshot::channel::<Status>();
        let mut body = end_when(busy, async { ended.await.unwrap() });
        assert!(body.frame().await.unwrap().unwrap().is_data());
        end.send(Status::unauthenticated("expired")).unwrap();
        let last = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(last["grpc-status"], "16");
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn an_idle_body_ends_with_the_status() {
        let (frames, received) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
        let (end, ended) = oneshot::channel::<Status>();
        let body = StreamBody::new(ReceiverStream::new(received));
        let mut body = end_when(body, async { ended.await.unwrap() });
        frames.send(Ok(Frame::data("first".into()))).await.unwrap();
        let first = body.frame().await.unwrap().unwrap();
        assert_eq!(first.into_data().unwrap(), "first");
        end.send(Status::unavailable("the instance is down")).unwrap();
        let last = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        let status = Status::from_header_map(&last).unwrap();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert_eq!(status.message(), "the instance is down");
        assert!(body.frame().await.is_none());
    }
}
