//! A small web site of the test's own: documents that may change, and a place to post reports to.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::task::AbortOnDropHandle;

/// Serves while it lives.
pub struct Site {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    documents: Arc<Mutex<HashMap<String, Document>>>,
    reports: mpsc::Receiver<Bytes>,
    _serving: AbortOnDropHandle<()>,
}

#[derive(Clone)]
struct Document {
    answer: Answer,
    served: u32,
}

#[derive(Clone)]
enum Answer {
    Body(&'static str, String),
    Redirect(String),
    /// None at all.
    Hang,
}

#[derive(Clone)]
struct Shared {
    documents: Arc<Mutex<HashMap<String, Document>>>,
    reports: mpsc::Sender<Bytes>,
}

impl Site {
    /// Starts on a free port.
    ///
    /// # Panics
    /// When there is none.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (sender, reports) = mpsc::channel(64);
        let documents = Arc::<Mutex<HashMap<_, _>>>::default();
        let shared = Shared { documents: documents.clone(), reports: sender };
        let router = Router::new()
            .route("/{*path}", get(document))
            .route("/report", post(report))
            .with_state(shared);
        let serving = tokio::spawn(async move {
            axum::serve(listener, router).await.expect("the site serves");
        });
        Self {
            url: format!("http://{address}"),
            documents,
            reports,
            _serving: AbortOnDropHandle::new(serving),
        }
    }

    /// Puts a document there, or another in its place.
    ///
    /// # Panics
    /// When another thread panicked with the documents in hand.
    pub fn put(&self, path: &str, content_type: &'static str, body: impl Into<String>) {
        self.answer(path, Answer::Body(content_type, body.into()));
    }

    /// Redirects requests for this document to a different one of the site.
    pub fn redirect(&self, path: &str, to: &str) {
        self.answer(path, Answer::Redirect(format!("{}/{to}", self.url)));
    }

    /// Leaves requests for this document without an answer.
    pub fn hang(&self, path: &str) {
        self.answer(path, Answer::Hang);
    }

    fn answer(&self, path: &str, answer: Answer) {
        let document = Document { answer, served: 0 };
        self.documents.lock().expect("unpoisoned").insert(path.to_owned(), document);
    }

    /// How often this document has been fetched since it was put there.
    ///
    /// # Panics
    /// When another thread panicked with the documents in hand.
    #[must_use]
    pub fn served(&self, path: &str) -> u32 {
        self.documents.lock().expect("unpoisoned").get(path).map_or(0, |document| document.served)
    }

    /// The next body that was posted to `/report`.
    ///
    /// # Panics
    /// When the site has ended.
    pub async fn report(&mut self) -> String {
        let body = self.reports.recv().await.expect("the site serves");
        String::from_utf8_lossy(&body).into_owned()
    }
}

async fn document(State(shared): State<Shared>, Path(path): Path<String>) -> Response {
    let answer = {
        let mut documents = shared.documents.lock().expect("unpoisoned");
        documents.get_mut(&path).map(|document| {
            document.served += 1;
            document.answer.clone()
        })
    };
    match answer {
        Some(Answer::Body(content_type, body)) => {
            ([(header::CONTENT_TYPE, content_type)], body).into_response()
        }
        Some(Answer::Redirect(to)) => Redirect::temporary(&to).into_response(),
        Some(Answer::Hang) => std::future::pending().await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn report(State(shared): State<Shared>, body: Bytes) -> StatusCode {
    match shared.reports.send(body).await {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::GONE,
    }
}
