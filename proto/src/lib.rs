//! Streamer's schema as Rust types, clients and servers, generated from the `.proto` files of this
//! package, and their codec. Used by every other crate.
#![allow(missing_docs, unreachable_pub)]

use prost::Message;

pub mod codec;
mod method_policy;
pub mod seam;
pub mod stubs;

pub use method_policy::{MethodPolicy, declared_methods, is_known_method, method_policy};

/// Types shared by all packages.
pub mod common {
    /// `streamer.common.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.common.v1");
    }
}

/// `RouterService`.
pub mod router {
    /// `streamer.router.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.router.v1");
    }
}

/// `ProgressService`.
pub mod progress {
    /// `streamer.progress.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.progress.v1");
    }
}

/// `WorkerService`.
pub mod processor {
    /// `streamer.processor.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.processor.v1");
    }
}

/// `ConnectionsService`.
pub mod connections {
    /// `streamer.connections.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.connections.v1");
    }
}

/// `AdminService`.
pub mod admin {
    /// `streamer.admin.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.admin.v1");
    }
}

/// Calls between services.
pub mod internal {
    /// `streamer.internal.v1`
    pub mod v1 {
        tonic::include_proto!("streamer.internal.v1");
    }
}

/// The long-running operations interface of AIP-151.
pub mod longrunning {
    tonic::include_proto!("google.longrunning");
}

/// `google.rpc.Status`.
pub mod rpc {
    tonic::include_proto!("google.rpc");
}

/// The public schema as an encoded `FileDescriptorSet`, for reflection.
pub const PUBLIC_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/public_descriptor.bin"));

/// Method of the public schema.
#[derive(Clone, Debug)]
pub struct Method {
    /// `/package.Service/Method`
    pub path: String,
    /// Whether the request is a stream.
    pub client_streaming: bool,
    /// Whether the response is a stream.
    pub server_streaming: bool,
}

/// Returns all methods of the public schema.
#[must_use]
pub fn public_methods() -> Vec<Method> {
    // Cannot fail: the server does not start unless reflection has decoded the same bytes.
    let files = prost_types::FileDescriptorSet::decode(PUBLIC_DESCRIPTOR_SET);
    let mut methods = Vec::new();
    for file in &files.unwrap_or_default().file {
        for service in &file.service {
            methods.extend(service.method.iter().map(|method| Method {
                path: format!("/{}.{}/{}", file.package(), service.name(), method.name()),
                client_streaming: method.client_streaming(),
                server_streaming: method.server_streaming(),
            }));
        }
    }
    methods
}

/// Converts milliseconds since the Unix epoch to a protobuf timestamp.
#[must_use]
pub fn timestamp(millis: i64) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: (millis.rem_euclid(1000) * 1_000_000) as i32,
    }
}

/// Converts a protobuf timestamp to milliseconds since the Unix epoch; rounds down.
#[must_use]
pub fn millis(timestamp: &prost_types::Timestamp) -> i64 {
    timestamp.seconds.saturating_mul(1000).saturating_add(i64::from(timestamp.nanos) / 1_000_000)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use prost_types::FileDescriptorSet;

    use crate::PUBLIC_DESCRIPTOR_SET;

    #[test]
    fn the_public_schema_contains_its_imports() {
        let files = FileDescriptorSet::decode(PUBLIC_DESCRIPTOR_SET).unwrap().file;
        let names: BTreeSet<_> = files.iter().map(|file| file.name()).collect();
        assert!(names.contains("streamer/common/v1/method_options.proto"));
        for import in files.iter().flat_map(|file| &file.dependency) {
            assert!(names.contains(import.as_str()), "{import}");
        }
    }
}
