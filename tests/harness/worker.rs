//! Workers: the real one in a process of its own, and one that does just what a test says.

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

use crate::{Process, Server, Signal, binary, patience::in_time};

/// `streamer worker`.
pub struct WorkerProcess {
    process: Process,
    log: Option<BufReader<ChildStderr>>,
}

impl WorkerProcess {
    /// Starts a worker of these actions; returns once it has connected.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(server: &Server, token: &str, actions: &str, arguments: &[&str]) -> Self {
        let mut command = command(&server.url, token, actions, arguments);
        let mut process = Process::spawn(command.stderr(Stdio::piped()));
        let log = BufReader::new(process.stderr());
        let mut worker = Self { process, log: Some(log) };
        worker.wait_for("connected");
        worker
    }

    /// Starts a worker of these actions, which connects when it can.
    #[must_use]
    pub fn spawn(server: &Server, token: &str, actions: &str, arguments: &[&str]) -> Self {
        Self::spawn_at(&server.url, token, actions, arguments)
    }

    /// Starts a worker of the server with this URL, which connects when it can.
    #[must_use]
    pub fn spawn_at(url: &str, token: &str, actions: &str, arguments: &[&str]) -> Self {
        let mut command = command(url, token, actions, arguments);
        Self { process: Process::spawn(command.stderr(Stdio::null())), log: None }
    }

    /// Reads its log up to a line that contains this.
    ///
    /// # Panics
    /// When the log ends before.
    pub fn wait_for(&mut self, text: &str) {
        let mut read = String::new();
        loop {
            let begin = read.len();
            let log = self.log.as_mut().expect("its log is piped");
            let count = log.read_line(&mut read).expect("its log can be read");
            assert!(count > 0, "its log ended without {text:?}:\n{read}");
            if read[begin..].contains(text) {
                return;
            }
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits for it to end by itself; returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.process.wait().code()
    }

    /// Sends it SIGTERM and waits for it to end; returns its exit code.
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
        Process::end_all([&mut self.process]);
    }
}

/// Returns once so many workers offer this action, as this caller is told.
///
/// # Panics
/// When the server cannot be asked.
pub async fn offered(server: &Server, token: &str, action: &str, workers: i32) {
    let api = Api::new(&server.url, token).expect("a URL");
    loop {
        let listed = api.router().list_actions(api.call(ListActionsRequest {})).await;
        let actions = listed.expect("the actions are listed").into_inner().actions;
        let found = actions.iter().find(|known| known.name == action);
        if found.map_or(0, |known| known.workers) == workers {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Returns once the router behind this gateway knows that this action is offered.
///
/// # Panics
/// When it cannot be asked.
pub async fn offered_at(url: &str, token: &str, action: &str) {
    let api = Api::new(url, token).expect("a URL");
    loop {
        let listed = api.router().list_actions(api.call(ListActionsRequest {})).await;
        let actions = listed.expect("the actions are listed").into_inner().actions;
        if actions.iter().any(|known| known.name == action && known.available) {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// A worker that follows a script.
pub struct ScriptedWorker {
    outbound: mpsc::Sender<WorkRequest>,
    inbound: Streaming<WorkResponse>,
    /// The server's first message.
    pub welcome: Welcome,
}

/// What a scripted worker says first.
#[must_use]
pub fn hello(id: &str, slots: i32, actions: Vec<Action>) -> Hello {
    Hello { worker_id: id.into(), slots, actions, ..Hello::default() }
}

/// A declaration with the defaults.
#[must_use]
pub fn declare(name: &str) -> Action {
    Action { name: name.into(), ..Action::default() }
}

/// What a worker that said `first` says on a later stream, to go on with these tasks.
#[must_use]
pub fn hello_again(first: &Hello, welcome: &Welcome, tasks: &[&Task]) -> Hello {
    let attempt = |task: &&Task| Attempt { uid: task.uid.clone(), attempt: task.attempt };
    Hello {
        attempts: tasks.iter().map(attempt).collect(),
        session_secret: welcome.session_secret.clone(),
        ..first.clone()
    }
}

impl ScriptedWorker {
    /// Opens a stream with this first message.
    ///
    /// # Errors
    /// When the server does not let it in.
    ///
    /// # Panics
    /// When the server does not begin with `welcome`.
    pub async fn open(
        server: &Server,
        token: &str,
        first: work_request::Message,
    ) -> Result<Self, Status> {
        Self::open_at(&server.url, token, first).await
    }

    /// Opens a stream with this first message at the server with this URL.
    ///
    /// # Errors
    /// When the server does not let it in.
    ///
    /// # Panics
    /// When the server does not begin with `welcome`.
    pub async fn open_at(
        url: &str,
        token: &str,
        first: work_request::Message,
    ) -> Result<Self, Status> {
        let endpoint = Endpoint::from_shared(url.to_owned()).expect("a URL");
        let channel = endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let (outbound, messages) = mpsc::channel(64);
        outbound.send(WorkRequest { message: Some(first) }).await.expect("there is room");
        let api = Api::new(url, token).expect("a URL");
        let call = api.call(ReceiverStream::new(messages));
        let mut inbound = WorkerServiceClient::new(channel).work(call).await?.into_inner();
        let first = inbound.message().await?.and_then(|first| first.message);
        let Some(Message::Welcome(welcome)) = first else { panic!("no welcome: {first:?}") };
        Ok(Self { outbound, inbound, welcome })
    }

    /// Comes with this `hello`, which must be right.
    ///
    /// # Panics
    /// When the server does not let it in.
    pub async fn come(server: &Server, token: &str, hello: Hello) -> Self {
        let first = work_request::Message::Hello(hello);
        Self::open(server, token, first).await.expect("the worker is let in")
    }

    /// Says something.
    ///
    /// # Panics
    /// When the stream is closed.
    pub async fn say(&self, message: work_request::Message) {
        let request = WorkRequest { message: Some(message) };
        self.outbound.send(request).await.expect("the stream is open");
    }

    /// Reports on a task.
    pub async fn report(&self, task: &Task, number: i64, kind: Kind) {
        self.report_again(task, 0, number, kind).await;
    }

    /// Reports on a task after the server has asked for reports this many times.
    pub async fn report_again(&self, task: &Task, resends: i32, number: i64, kind: Kind) {
        let Task { uid, attempt, .. } = task.clone();
        let report = Report { uid, attempt, number, kind: Some(kind), resends };
        self.say(work_request::Message::Report(report)).await;
    }

    /// The next message, but for those about its token.
    ///
    /// # Errors
    /// When the server ends the stream.
    pub async fn next(&mut self) -> Result<Message, Status> {
        loop {
            let response = in_time("a message to the worker", self.inbound.message()).await?;
            let ended = || Status::unavailable("the stream has ended");
            match response.ok_or_else(ended)?.message {
                Some(Message::TokenStatus(_)) | None => {}
                Some(message) => return Ok(message),
            }
        }
    }

    /// The next task; other messages are passed over.
    ///
    /// # Panics
    /// When the server ends the stream.
    pub async fn task(&mut self) -> Task {
        loop {
            if let Message::Task(task) = self.next().await.expect("the stream is open") {
                return task;
            }
        }
    }

    /// The acknowledgment that a task has ended; other messages are passed over.
    ///
    /// # Panics
    /// When the server ends the stream, or takes the task away.
    pub async fn ended(&mut self, task: &Task) -> Acknowledgment {
        loop {
            match self.next().await.expect("the stream is open") {
                Message::Acknowledgment(said) if said.ended && said.uid == task.uid => return said,
                Message::Revoke(said) if said.uid == task.uid => panic!("it was lost: {said:?}"),
                _ => {}
            }
        }
    }
}
