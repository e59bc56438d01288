//! An HTTP server with documents that can change, and an endpoint for reports.

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

/// A running server; stopped on drop.
pub struct Site {
    /// URL of the server: `http://127.0.0.1:PORT`.
    pub url: String,
    documents: Arc<Mutex<HashMap<String, Document>>>,
    reports: mpsc::Receiver<Bytes>,
    _serving: AbortOnDropHandle<()>,
}

#[derive(Clone)]
struct Document {
    reply: Reply,
    fetches: u32,
}

#[derive(Clone)]
enum Reply {
    Body(&'static str, String),
    Redirect(String),
    /// Does not respond.
    Hang,
}

#[derive(Clone)]
struct Shared {
    documents: Arc<Mutex<HashMap<String, Document>>>,
    reports: mpsc::Sender<Bytes>,
}

impl Site {
    /// Starts a server on a free port.
    ///
    /// # Panics
    /// Panics if no port is free.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("the listener is bound");
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

    /// Adds or replaces a document.
    ///
    /// # Panics
    /// Panics if a thread panicked while it held the lock of the documents.
    pub fn put(&self, path: &str, content_type: &'static str, body: impl Into<String>) {
        self.set_reply(path, Reply::Body(content_type, body.into()));
    }

    /// Redirects requests for the document `path` to the document `to`.
    pub fn redirect(&self, path: &str, to: &str) {
        self.set_reply(path, Reply::Redirect(format!("{}/{to}", self.url)));
    }

    /// Sends no response to requests for the document `path`.
    pub fn hang(&self, path: &str) {
        self.set_reply(path, Reply::Hang);
    }

    fn set_reply(&self, path: &str, reply: Reply) {
        let document = Document { reply, fetches: 0 };
        self.documents.lock().expect("unpoisoned").insert(path.to_owned(), document);
    }

    /// Returns the number of times that the document `path` was fetched since it was set.
    ///
    /// # Panics
    /// Panics if a thread panicked while it held the lock of the documents.
    #[must_use]
    pub fn fetches(&self, path: &str) -> u32 {
        self.documents.lock().expect("unpoisoned").get(path).map_or(0, |document| document.fetches)
    }

    /// Returns the next body that is posted to `/report`.
    ///
    /// # Panics
    /// Panics if the server has stopped.
    pub async fn next_report(&mut self) -> String {
        let body = self.reports.recv().await.expect("the site serves");
        String::from_utf8_lossy(&body).into_owned()
    }
}

async fn document(State(shared): State<Shared>, Path(path): Path<String>) -> Response {
    let reply = {
        let mut documents = shared.documents.lock().expect("unpoisoned");
        documents.get_mut(&path).map(|document| {
            document.fetches += 1;
            document.reply.clone()
        })
    };
    match reply {
        Some(Reply::Body(content_type, body)) => {
            ([(header::CONTENT_TYPE, content_type)], body).into_response()
        }
        Some(Reply::Redirect(to)) => Redirect::temporary(&to).into_response(),
        Some(Reply::Hang) => std::future::pending().await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn report(State(shared): State<Shared>, body: Bytes) -> StatusCode {
    match shared.reports.send(body).await {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::GONE,
    }
}
