//! Verifies, from the events of a request alone, that a reader received the complete output.

use streamer_core::{OutputDigest, hex};

/// Count and checksum of the valid chunks of a log that is read from its beginning.
#[derive(Clone, Debug, Default)]
pub struct OutputVerifier {
    digest: OutputDigest,
    /// `seq` of the latest `started` event, and the digest at that event, to which a rewind returns.
    attempt_start: (i64, OutputDigest),
}

/// The output that was read differs from the output that was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "output checksum mismatch: read {chunks} chunks with SHA-256 {sha256}, expected \
     {expected_chunks} with {expected_sha256}"
)]
pub struct OutputMismatch {
    /// Number of valid chunks that were read.
    pub chunks: i64,
    /// SHA-256 of the valid chunks that were read, in hexadecimal digits.
    pub sha256: String,
    /// Number of chunks according to the terminal event.
    pub expected_chunks: i64,
    /// SHA-256 according to the terminal event.
    pub expected_sha256: String,
}

impl OutputVerifier {
    /// Records that an attempt started with the event `seq`.
    pub fn started(&mut self, seq: i64) {
        self.attempt_start = (seq, self.digest.clone());
    }

    /// Adds the next chunk.
    pub fn chunk(&mut self, data: &[u8]) {
        self.digest.push(data);
    }

    /// Discards the chunks after `seq`, which is the sequence number of a `started` event, or 0.
    pub fn rewind(&mut self, seq: i64) {
        self.digest = if seq > 0 && seq == self.attempt_start.0 {
            self.attempt_start.1.clone()
        } else {
            OutputDigest::default()
        };
    }

    /// Compares the output with the number of chunks and the SHA-256 from the terminal event.
    ///
    /// # Errors
    /// Returns an error if they differ.
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

    fn summary(chunks: &[&str]) -> (i64, String) {
        let mut digest = OutputDigest::default();
        chunks.iter().for_each(|chunk| digest.push(chunk.as_bytes()));
        (digest.chunks(), hex(&digest.sha256()))
    }

    #[test]
    fn output_of_a_failed_attempt_is_discarded() {
        let mut check = OutputVerifier::default();
        check.started(2);
        check.chunk(b"lost");
        check.rewind(2);
        check.started(5);
        check.chunk(b"a");
        check.chunk(b"b");
        let (chunks, sha256) = summary(&["a", "b"]);
        assert_eq!(check.verify(chunks, &sha256), Ok(()));
        let (chunks, sha256) = summary(&["a", "c"]);
        let mismatch = check.verify(chunks, &sha256).unwrap_err();
        assert_eq!((mismatch.chunks, mismatch.expected_chunks), (2, 2));
        check.rewind(0);
        let (chunks, sha256) = summary(&[]);
        assert_eq!(check.verify(chunks, &sha256), Ok(()));
    }
}
