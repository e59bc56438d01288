//! Digest that a reader uses to verify that it has the complete output of a request.

use std::fmt;

use sha2::{Digest, Sha256};

/// Number of output chunks, and SHA-256 hash of their concatenated bytes.
#[derive(Clone, Default)]
pub struct OutputDigest {
    chunks: i64,
    hash: Sha256,
}

impl OutputDigest {
    /// Adds the next chunk.
    pub fn push(&mut self, chunk: &[u8]) {
        self.chunks += 1;
        self.hash.update(chunk);
    }

    /// Returns the number of chunks that were added.
    #[must_use]
    pub fn chunks(&self) -> i64 {
        self.chunks
    }

    /// Returns the SHA-256 hash of the concatenated chunks.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }
}

impl fmt::Debug for OutputDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OutputDigest").field("chunks", &self.chunks).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hex;

    #[test]
    fn the_hash_covers_the_concatenated_chunks() {
        let mut digest = OutputDigest::default();
        digest.push(b"a");
        digest.push(b"bc");
        assert_eq!(digest.chunks(), 2);
        // FIPS 180-2, the one-block example "abc".
        assert_eq!(
            hex(&digest.sha256()),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
