//! A real browser, without a window.

use std::process::Stdio;

use tempfile::TempDir;

use crate::{Process, tool};

/// Chromium with one page, until dropped.
pub struct Browser {
    _process: Process,
    // Removed after the process has ended, which drops first.
    _profile: TempDir,
}

impl Browser {
    /// Opens this page.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn open(url: &str) -> Self {
        let profile = TempDir::with_prefix("streamer-browser-").expect("a temporary folder");
        let mut command = Process::command(tool("STREAMER_TESTS_CHROMIUM"));
        command
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--disable-dev-shm-usage"])
            // Kept open until we close it.
            .arg("--remote-debugging-port=0")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self { _process: Process::spawn(&mut command), _profile: profile }
    }
}
