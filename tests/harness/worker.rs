//! Workers: the `streamer worker` process, and a worker that is scripted by a test.

use std::{
    io::{BufRead, BufReader},
    process::{ChildStderr, Command, Stdio},
};

use streamer_client::Api;
use streamer_proto::{
    common::v1::Action,
    processor::v1::{
        Acknowledgment, Attempt, Hello, Report, Task, Welcome, WorkRequest, WorkResponse,
        report::Kind, work_request, work_response::Message,
        worker_service_client::WorkerServiceClient,
    },
    router::v1::ListActionsRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Endpoint};

use crate::{Process, Server, Signal, binary, timeout::within_timeout};

/// A `streamer worker` process.
pub struct WorkerProcess {
    process: Process,
    log: Option<BufReader<ChildStderr>>,
}

impl WorkerProcess {
    /// Starts a worker with the given actions; returns once the worker has connected.
    ///
    /// # Panics
    /// Panics if the log of the worker ends before that.
    #[must_use]
    pub fn start(server: &Server, token: &str, actions: &str, arguments: &[&str]) -> Self {
        let mut command = command(&server.url, token, actions, arguments);
        let mut process = Process::spawn(command.stderr(Stdio::piped()));
        let log = BufReader::new(process.stderr());
        let mut worker = Self { process, log: Some(log) };
        worker.wait_for_log("connected");
        worker
    }

    /// Starts a worker with the given actions, without waiting until it has connected.
    #[must_use]
    pub fn spawn(server: &Server, token: &str, actions: &str, arguments: &[&str]) -> Self {
        Self::spawn_at(&server.url, token, actions, arguments)
    }

    /// Starts a worker of the server at `url`, without waiting until it has connected.
    #[must_use]
    pub fn spawn_at(url: &str, token: &str, actions: &str, arguments: &[&str]) -> Self {
        let mut command = command(url, token, actions, arguments);
        Self { process: Process::spawn(command.stderr(Stdio::null())), log: None }
    }

    /// Reads the log of the worker up to a line that contains `text`.
    ///
    /// # Panics
    /// Panics if the log ends before that.
    pub fn wait_for_log(&mut self, text: &str) {
        let mut read = String::new();
        loop {
            let begin = read.len();
            let log = self.log.as_mut().expect("the log is piped");
            let count = log.read_line(&mut read).expect("the log can be read");
            assert!(count > 0, "the log ended without {text:?}:\n{read}");
            if read[begin..].contains(text) {
                return;
            }
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills the worker with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits until the worker exits; returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.process.wait().code()
    }

    /// Sends SIGTERM and waits until the worker exits; returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.process.stop()
    }
}

fn command(url: &str, token: &str, actions: &str, arguments: &[&str]) -> Command {
    let mut command = Process::command(binary());
    command
        .args(["worker", "--actions", actions, "--server", url, "--token", token])
        .args(arguments)
        .env_clear()
        .env("STREAMER_LOG", "info")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        Process::stop_all([&mut self.process]);
    }
}

/// Waits until the caller's list of actions shows `workers` workers for an action.
///
/// # Panics
/// Panics if the actions cannot be listed.
pub async fn wait_for_workers(server: &Server, token: &str, action: &str, workers: i32) {
    let api = Api::new(&server.url, token).expect("a URL");
    loop {
        let listed = api.router().list_actions(api.call(ListActionsRequest {})).await;
        let actions = listed.expect("the actions are listed").into_inner().actions;
        let found = actions.iter().find(|listed| listed.name == action);
        if found.map_or(0, |listed| listed.workers) == workers {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Waits until the server at `url` lists an action as available.
///
/// # Panics
/// Panics if the actions cannot be listed.
pub async fn wait_for_action(url: &str, token: &str, action: &str) {
    let api = Api::new(url, token).expect("a URL");
    loop {
        let listed = api.router().list_actions(api.call(ListActionsRequest {})).await;
        let actions = listed.expect("the actions are listed").into_inner().actions;
        if actions.iter().any(|listed| listed.name == action && listed.available) {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Worker whose messages are sent by the test.
pub struct ScriptedWorker {
    outbound: mpsc::Sender<WorkRequest>,
    inbound: Streaming<WorkResponse>,
    /// First message from the server.
    pub welcome: Welcome,
}

/// Returns `hello`, the first message from a worker.
#[must_use]
pub fn hello(id: &str, slots: i32, actions: Vec<Action>) -> Hello {
    Hello { worker_id: id.into(), slots, actions, ..Hello::default() }
}

/// Returns a declaration of an action with default values.
#[must_use]
pub fn declare(name: &str) -> Action {
    Action { name: name.into(), ..Action::default() }
}

/// Returns the first message with which a worker that connected with `first` resumes the given tasks on a new
/// stream.
#[must_use]
pub fn resume_hello(first: &Hello, welcome: &Welcome, tasks: &[&Task]) -> Hello {
    let attempt = |task: &&Task| Attempt { uid: task.uid.clone(), attempt: task.attempt };
    Hello {
        attempts: tasks.iter().map(attempt).collect(),
        session_secret: welcome.session_secret.clone(),
        ..first.clone()
    }
}

impl ScriptedWorker {
    /// Opens a stream with the given first message.
    ///
    /// # Errors
    /// Returns an error if the server rejects the stream.
    ///
    /// # Panics
    /// Panics if the first message from the server is not `welcome`.
    pub async fn try_connect(
        server: &Server,
        token: &str,
        first: work_request::Message,
    ) -> Result<Self, Status> {
        Self::try_connect_at(&server.url, token, first).await
    }

    /// Opens a stream to the server at `url` with the given first message.
    ///
    /// # Errors
    /// Returns an error if the server rejects the stream.
    ///
    /// # Panics
    /// Panics if the first message from the server is not `welcome`.
    pub async fn try_connect_at(
        url: &str,
        token: &str,
        first: work_request::Message,
    ) -> Result<Self, Status> {
        let endpoint = Endpoint::from_shared(url.to_owned()).expect("a URL");
        let channel = endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let (outbound, messages) = mpsc::channel(64);
        outbound.send(WorkRequest { message: Some(first) }).await.expect("the channel has room");
        let api = Api::new(url, token).expect("a URL");
        let call = api.call(ReceiverStream::new(messages));
        let mut inbound = WorkerServiceClient::new(channel).work(call).await?.into_inner();
        let first = inbound.message().await?.and_then(|first| first.message);
        let Some(Message::Welcome(welcome)) = first else { panic!("no welcome: {first:?}") };
        Ok(Self { outbound, inbound, welcome })
    }

    /// Opens a stream with the given `hello`.
    ///
    /// # Panics
    /// Panics if the server rejects the stream.
    pub async fn connect(server: &Server, token: &str, hello: Hello) -> Self {
        let first = work_request::Message::Hello(hello);
        Self::try_connect(server, token, first).await.expect("the server accepts the worker")
    }

    /// Sends a message.
    ///
    /// # Panics
    /// Panics if the stream is closed.
    pub async fn send(&self, message: work_request::Message) {
        let request = WorkRequest { message: Some(message) };
        self.outbound.send(request).await.expect("the stream is open");
    }

    /// Sends a report about a task.
    pub async fn report(&self, task: &Task, number: i64, kind: Kind) {
        self.report_after_resends(task, 0, number, kind).await;
    }

    /// Sends a report about a task after the server has requested the given number of resends.
    pub async fn report_after_resends(&self, task: &Task, resends: i32, number: i64, kind: Kind) {
        let Task { uid, attempt, .. } = task.clone();
        let report = Report { uid, attempt, number, kind: Some(kind), resends };
        self.send(work_request::Message::Report(report)).await;
    }

    /// Returns the next message; skips messages about the token.
    ///
    /// # Errors
    /// Returns an error if the server ends the stream.
    pub async fn next(&mut self) -> Result<Message, Status> {
        loop {
            let response =
                within_timeout("a message to the worker", self.inbound.message()).await?;
            let ended = || Status::unavailable("the stream has ended");
            match response.ok_or_else(ended)?.message {
                Some(Message::TokenStatus(_)) | None => {}
                Some(message) => return Ok(message),
            }
        }
    }

    /// Returns the next task; skips other messages.
    ///
    /// # Panics
    /// Panics if the server ends the stream.
    pub async fn next_task(&mut self) -> Task {
        loop {
            if let Message::Task(task) = self.next().await.expect("the stream is open") {
                return task;
            }
        }
    }

    /// Waits for the acknowledgment that a task has ended; skips other messages.
    ///
    /// # Panics
    /// Panics if the server ends the stream or revokes the task.
    pub async fn wait_for_end(&mut self, task: &Task) -> Acknowledgment {
        loop {
            match self.next().await.expect("the stream is open") {
                Message::Acknowledgment(reply) if reply.ended && reply.uid == task.uid => {
                    return reply;
                }
                Message::Revoke(revoke) if revoke.uid == task.uid => panic!("revoked: {revoke:?}"),
                _ => {}
            }
        }
    }
}
