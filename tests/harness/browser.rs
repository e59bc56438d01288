//! Runs a real browser in headless mode.

use std::process::Stdio;

use tempfile::TempDir;

use crate::{Process, tool};

/// Chromium with one page; closed on drop.
pub struct Browser {
    _process: Process,
    // Dropped after the process, which removes the profile.
    _profile: TempDir,
}

impl Browser {
    /// Opens a page.
    ///
    /// # Panics
    /// Panics if Chromium cannot be started.
    #[must_use]
    pub fn open(url: &str) -> Self {
        let profile = TempDir::with_prefix("streamer-browser-").expect("a temporary folder");
        let mut command = Process::command(tool("STREAMER_TESTS_CHROMIUM"));
        command
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--disable-dev-shm-usage"])
            // Keeps the browser running until it is closed.
            .arg("--remote-debugging-port=0")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self { _process: Process::spawn(&mut command), _profile: profile }
    }
}
