//! The proof that a reader has a request's whole output: pure bookkeeping over its events.

use streamer_core::{OutputDigest, output::hex};

/// Counts and hashes the valid chunks of a log that is read from its beginning.
#[derive(Clone, Debug, Default)]
pub struct OutputCheck {
    digest: OutputDigest,
    /// The output as of the latest `started`, and its `seq`: where a rewind goes back to.
    base: (i64, OutputDigest),
}

/// What was read is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the output does not match its proof: {chunks} chunks with SHA-256 {sha256} were read, \
     {expected_chunks} with {expected_sha256} were written"
)]
pub struct OutputMismatch {
    /// Valid chunks that were read.
    pub chunks: i64,
    /// Their SHA-256, in hexadecimal digits.
    pub sha256: String,
    /// As the terminal event says.
    pub expected_chunks: i64,
    /// As the terminal event says.
    pub expected_sha256: String,
}

impl OutputCheck {
    /// An attempt started.
    pub fn started(&mut self, seq: i64) {
        self.base = (seq, self.digest.clone());
    }

    /// The next chunk.
    pub fn chunk(&mut self, data: &[u8]) {
        self.digest.push(data);
    }

    /// Chunks after this `seq` are void; it is that of a `started` event, or 0.
    pub fn rewind(&mut self, seq: i64) {
        self.digest = if seq > 0 && seq == self.base.0 {
            self.base.1.clone()
        } else {
            OutputDigest::default()
        };
    }

    /// Compares with what the terminal event says.
    ///
    /// # Errors
    /// When it differs.
    pub fn verify(&self, chunks: i64, sha256: &str) -> Result<(), OutputMismatch> {
        let read = hex(&self.digest.sha256());
        if self.digest.chunks() == chunks && read.eq_ignore_ascii_case(sha256) {
            return Ok(());
        }
        Err(OutputMismatch {
            chunks: self.digest.chunks(),
            sha256: read,
            expected_chunks: chunks,
            expected_sha256: sha256.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(chunks: &[&str]) -> (i64, String) {
        let mut digest = OutputDigest::default();
        chunks.iter().for_each(|chunk| digest.push(chunk.as_bytes()));
        (digest.chunks(), hex(&digest.sha256()))
    }

    #[test]
    fn what_an_attempt_put_out_is_void_after_its_failure() {
        let mut check = OutputCheck::default();
        check.started(2);
        check.chunk(b"lost");
        check.rewind(2);
        check.started(5);
        check.chunk(b"a");
        check.chunk(b"b");
        let (chunks, sha256) = proof(&["a", "b"]);
        assert_eq!(check.verify(chunks, &sha256), Ok(()));
        let (chunks, sha256) = proof(&["a", "c"]);
        let mismatch = check.verify(chunks, &sha256).unwrap_err();
        assert_eq!((mismatch.chunks, mismatch.expected_chunks), (2, 2));
        check.rewind(0);
        let (chunks, sha256) = proof(&[]);
        assert_eq!(check.verify(chunks, &sha256), Ok(()));
    }
}
