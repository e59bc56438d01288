//! Child processes that end with the test that starts them, even if it panics or is killed.
//!
//! Each child leads a separate process group. The group is killed when its [`Process`] is dropped, even during
//! a panic. If the test process itself is killed, the kernel kills the child (`PR_SET_PDEATHSIG`, which
//! `setpriv` of util-linux sets). The kernel does so when the *thread* that started the child ends;
//! therefore one thread, which lives as long as the test process, starts all children.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, Read},
    os::unix::process::CommandExt,
    process::{
        self, Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio,
    },
    sync::{
        OnceLock,
        mpsc::{Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    process::{
        Pid, PidfdFlags, WaitId, WaitIdOptions, kill_process, kill_process_group, pidfd_open,
        waitid,
    },
};

pub use rustix::process::Signal;

/// Environment variable that names the file to which instrumented binaries of a coverage build write profiles.
const PROFILE: &str = "LLVM_PROFILE_FILE";

/// Maximum time for which a process may drain after SIGTERM before a second SIGTERM stops it immediately.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time that a process may take to exit after the second SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A running child process and its process group.
pub struct Process {
    child: Child,
    /// Exit status, set once the child has been reaped. Its process ID may then belong to a different process.
    status: Option<ExitStatus>,
}

impl Process {
    /// Returns a command for [`Process::spawn`] and [`Process::output`].
    #[must_use]
    pub fn command(program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
        command
    }

    /// Starts a command that [`Process::command`] returned. If the program cannot be started, the child
    /// reports the reason on its standard error and exits with code 127.
    ///
    /// # Panics
    /// Panics if `setpriv` cannot be started.
    #[must_use]
    pub fn spawn(command: &mut Command) -> Self {
        if let Some(file) = env::var_os(PROFILE) {
            command.env(PROFILE, file);
        }
        let command = std::mem::replace(command, Command::new("true"));
        let (reply, spawned) = sync_channel(1);
        spawner().send(Spawn { command, reply }).expect("the spawner lives as long as the process");
        let child = spawned.recv().expect("the spawner replies to each command");
        Self { child: child.expect("setpriv (util-linux) can be started"), status: None }
    }

    /// Runs a command that [`Process::command`] returned, without input, and returns its output.
    ///
    /// # Panics
    /// Panics if the command cannot be started or its output cannot be read.
    #[must_use]
    pub fn output(command: &mut Command) -> Output {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Self::spawn(command);
        let (mut out, mut err) = (process.stdout(), process.stderr());
        let (stdout, stderr) = thread::scope(|scope| {
            let stderr = scope.spawn(|| read_all(&mut err));
            (read_all(&mut out), stderr.join().expect("the output can be read"))
        });
        Output { status: process.wait(), stdout, stderr }
    }

    /// Returns the standard input of the process. Can be called once.
    ///
    /// # Panics
    /// Panics if the standard input is not a pipe or was returned before.
    #[must_use]
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("the standard input is a pipe")
    }

    /// Returns the standard output of the process. Can be called once.
    ///
    /// # Panics
    /// Panics if the standard output is not a pipe or was returned before.
    #[must_use]
    pub fn stdout(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("the standard output is a pipe")
    }

    /// Returns the standard error of the process. Can be called once.
    ///
    /// # Panics
    /// Panics if the standard error is not a pipe or was returned before.
    #[must_use]
    pub fn stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("the standard error is a pipe")
    }

    /// Returns the peak resident memory of the process, in bytes.
    ///
    /// # Panics
    /// Panics if the process has been waited for.
    #[must_use]
    pub fn peak_resident_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// Returns the resident memory of the process, in bytes.
    ///
    /// # Panics
    /// Panics if the process has been waited for.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    fn memory(&self, line: &str) -> u64 {
        assert!(self.status.is_none(), "the process has exited");
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("a child that is not reaped has a status");
        let value = status.lines().find_map(|found| found.strip_prefix(line));
        let kilobytes = value.and_then(|rest| rest.split_whitespace().next());
        let kilobytes: u64 = kilobytes.expect("Linux reports the value").parse().expect("a number");
        kilobytes * 1024
    }

    /// Returns whether the process is running.
    pub(crate) fn is_running(&mut self) -> bool {
        self.status.is_none() && self.wait_timeout(Duration::ZERO).is_none()
    }

    /// Sends a signal to the process, but not to the rest of its group.
    ///
    /// # Panics
    /// Panics if the process has been waited for.
    pub fn signal(&self, signal: Signal) {
        assert!(self.status.is_none(), "the process has exited");
        kill_process(self.pid(), signal).expect("a child that is not reaped accepts signals");
    }

    /// Waits until the process exits, and kills the rest of its group.
    ///
    /// # Panics
    /// Panics if the process cannot be waited for.
    pub fn wait(&mut self) -> ExitStatus {
        // Without this, a process that reads its whole input would never exit.
        drop(self.child.stdin.take());
        if self.status.is_none() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            retry_on_intr(|| waitid(WaitId::Pid(self.pid()), options))
                .expect("the process is a child");
        }
        self.reap()
    }

    /// Waits until the process exits, for at most `timeout`.
    ///
    /// # Panics
    /// Panics if the process cannot be waited for.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Option<ExitStatus> {
        if self.status.is_none() {
            let pidfd =
                pidfd_open(self.pid(), PidfdFlags::empty()).expect("the process is a child");
            let mut exited = [PollFd::new(&pidfd, PollFlags::IN)];
            let timeout = Timespec::try_from(timeout).expect("the timeout is in range");
            if retry_on_intr(|| poll(&mut exited, Some(&timeout))).expect("a pidfd can be polled")
                == 0
            {
                return None;
            }
        }
        Some(self.reap())
    }

    /// Sends SIGTERM and waits until the process exits; returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait().code()
    }

    /// Kills the process group with SIGKILL; returns once the process has exited.
    pub fn kill(&mut self) {
        self.reap();
    }

    /// Stops processes with SIGTERM, and with a second SIGTERM if they drain for longer than [`DRAIN_TIMEOUT`].
    /// Kills the processes if the test panics.
    ///
    /// # Panics
    /// Panics if one of them does not exit.
    pub(crate) fn stop_all<'a>(processes: impl IntoIterator<Item = &'a mut Self>) {
        let mut running: Vec<&mut Self> = processes.into_iter().collect();
        if thread::panicking() {
            running.into_iter().for_each(Self::kill);
            return;
        }
        for timeout in [DRAIN_TIMEOUT, STOP_TIMEOUT] {
            running.retain(|process| process.status.is_none());
            for process in &running {
                process.signal(Signal::TERM);
                // The test may have suspended the process.
                process.signal(Signal::CONT);
            }
            for process in &mut running {
                process.wait_timeout(timeout);
            }
        }
        running.retain(|process| process.status.is_none());
        assert!(running.is_empty(), "a process does not exit after SIGTERM");
    }

    /// Kills the process group, and reaps the process.
    fn reap(&mut self) -> ExitStatus {
        *self.status.get_or_insert_with(|| {
            // Before the process is reaped, while its process ID still identifies its group.
            kill_process_group(Pid::from_child(&self.child), Signal::KILL)
                .expect("the group of a child can be killed");
            self.child.wait().expect("the process is a child")
        })
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.reap();
    }
}

/// Request to the thread that starts children.
struct Spawn {
    command: Command,
    reply: SyncSender<io::Result<Child>>,
}

fn spawner() -> &'static Sender<Spawn> {
    static SPAWNER: OnceLock<Sender<Spawn>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        exit_when_hung();
        let (commands, received) = channel::<Spawn>();
        let spawner = thread::Builder::new().name("spawner".into());
        let spawned = spawner.spawn(move || {
            for Spawn { mut command, reply } in received {
                reply.send(command.spawn()).expect("the caller waits for the reply");
            }
        });
        spawned.expect("a thread can be started");
        commands
    })
}

/// Exits with an error if the tests of this process have not finished after a timeout.
fn exit_when_hung() {
    // Suite `cluster` takes 140 s on two idle cores, and over 300 s on two busy cores.
    const TIMEOUT: Duration = Duration::from_secs(900);
    // Suite `crash` takes longer with more kills.
    let kills = env::var("STREAMER_TESTS_KILLS").ok().and_then(|text| text.parse().ok());
    let timeout = TIMEOUT + Duration::from_secs(kills.unwrap_or(0));
    thread::spawn(move || {
        thread::sleep(timeout);
        eprintln!("the tests of this suite have not finished after {} s", timeout.as_secs());
        process::exit(101);
    });
}

fn read_all(from: &mut impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).expect("the output can be read");
    all
}
