//! A real browser, without a window.

use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::tool;

/// Chromium with one page, until dropped.
pub struct Browser {
    child: Child,
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
        let child = Command::new(tool("STREAMER_TESTS_CHROMIUM"))
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--disable-dev-shm-usage"])
            // Kept open until we close it.
            .arg("--remote-debugging-port=0")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the browser can be started");
        Self { child, _profile: profile }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its helpers end with it.
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}
