//! Policies of calls between services, by method. Our methods declare them in the `.proto` files
//! (`streamer/common/v1/method_options.proto`), from which the build script generates a table.

use std::time::Duration;

use crate::common::v1::StreamKind;

/// How services call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodPolicy {
    /// Whether a call is retried although an earlier attempt may have been executed.
    pub idempotent: bool,
    /// Whether a call is retried at a different instance if an instance responds with UNAVAILABLE.
    pub retry_if_unavailable: bool,
    /// Maximum time until the response of one instance begins; `None` means no limit.
    pub timeout: Option<Duration>,
    /// Kind of the response stream.
    pub stream_kind: StreamKind,
}

impl MethodPolicy {
    /// Policy of unknown methods.
    const NOT_IDEMPOTENT: Self = Self {
        idempotent: false,
        retry_if_unavailable: false,
        timeout: None,
        stream_kind: StreamKind::Unspecified,
    };

    /// Returns whether the response is a watch that can be opened again at a different instance. The stream of a
    /// submission cannot: its first message reports what was stored.
    #[must_use]
    pub fn is_movable_watch(&self) -> bool {
        self.stream_kind == StreamKind::Watch && self.retry_if_unavailable
    }
}

/// Policies of our methods, sorted by path.
static DECLARED: &[(&str, MethodPolicy)] =
    include!(concat!(env!("OUT_DIR"), "/method_policies.rs"));

const IDEMPOTENT: MethodPolicy =
    MethodPolicy { idempotent: true, retry_if_unavailable: true, ..MethodPolicy::NOT_IDEMPOTENT };

/// Policies of methods whose `.proto` files belong to others.
static EXTERNAL: [(&str, MethodPolicy); 6] = [
    ("/google.longrunning.Operations/CancelOperation", IDEMPOTENT),
    // The name of an operation may be an `id`, which a new request can have after the first call.
    ("/google.longrunning.Operations/DeleteOperation", MethodPolicy::NOT_IDEMPOTENT),
    (
        "/google.longrunning.Operations/GetOperation",
        MethodPolicy { timeout: Some(Duration::from_secs(10)), ..IDEMPOTENT },
    ),
    ("/google.longrunning.Operations/ListOperations", IDEMPOTENT),
    ("/google.longrunning.Operations/WaitOperation", IDEMPOTENT),
    (
        "/grpc.health.v1.Health/Watch",
        MethodPolicy { stream_kind: StreamKind::Watch, ..MethodPolicy::NOT_IDEMPOTENT },
    ),
];

/// Methods of other external services that servers offer. Services do not call them with a policy.
static SERVED: [&str; 3] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// Returns the policy of the method with a path `/package.Service/Method`. Calls of an unknown method are not
/// retried, except if they were not executed (transparent retry).
#[must_use]
pub fn method_policy(path: &str) -> MethodPolicy {
    find(path).unwrap_or(MethodPolicy::NOT_IDEMPOTENT)
}

/// Returns whether the method with this path has a policy.
#[must_use]
pub fn is_known_method(path: &str) -> bool {
    find(path).is_some()
}

/// Returns the paths of all methods that servers offer.
pub fn declared_methods() -> impl Iterator<Item = &'static str> {
    DECLARED.iter().chain(&EXTERNAL).map(|(path, _)| *path).chain(SERVED)
}

fn find(path: &str) -> Option<MethodPolicy> {
    [DECLARED, &EXTERNAL].into_iter().find_map(|policies| {
        let index = policies.binary_search_by_key(&path, |(method, _)| method).ok()?;
        Some(policies[index].1)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::{DECLARED, EXTERNAL, MethodPolicy, method_policy};
    use crate::{
        PUBLIC_DESCRIPTOR_SET,
        common::v1::StreamKind::{self, Session, Transfer, Unspecified, Watch},
        public_methods,
    };

    /// Returns a policy; a timeout of 0 means none.
    fn policy(
        idempotent: bool,
        retry_if_unavailable: bool,
        seconds: u64,
        stream_kind: StreamKind,
    ) -> MethodPolicy {
        let timeout = (seconds > 0).then(|| std::time::Duration::from_secs(seconds));
        MethodPolicy { idempotent, retry_if_unavailable, timeout, stream_kind }
    }

    #[test]
    fn policies_are_as_reviewed() {
        let once = policy(false, false, 0, Unspecified);
        let read = policy(true, true, 10, Unspecified);
        let unlimited = policy(true, true, 0, Unspecified);
        let internal = policy(true, true, 5, Unspecified);
        let expected = [
            ("/google.longrunning.Operations/CancelOperation", unlimited),
            ("/google.longrunning.Operations/DeleteOperation", once),
            ("/google.longrunning.Operations/GetOperation", read),
            ("/google.longrunning.Operations/ListOperations", unlimited),
            ("/google.longrunning.Operations/WaitOperation", unlimited),
            ("/grpc.health.v1.Health/Watch", policy(false, false, 0, Watch)),
            ("/streamer.admin.v1.AdminService/Backup", policy(true, false, 0, Transfer)),
            ("/streamer.connections.v1.ConnectionsService/Broadcast", once),
            ("/streamer.connections.v1.ConnectionsService/Disconnect", unlimited),
            ("/streamer.connections.v1.ConnectionsService/List", read),
            ("/streamer.connections.v1.ConnectionsService/Send", once),
            ("/streamer.internal.v1.AdmissionService/ReportSubmissions", once),
            ("/streamer.internal.v1.EventLogService/Announce", internal),
            ("/streamer.internal.v1.EventLogService/Publish", internal),
            ("/streamer.internal.v1.ExecutionService/Execute", once),
            (
                "/streamer.internal.v1.ExecutionService/FindAction",
                policy(true, false, 0, Unspecified),
            ),
            ("/streamer.internal.v1.ExecutionService/NotifyQueued", internal),
            ("/streamer.internal.v1.ExecutionService/SignalCancel", internal),
            ("/streamer.internal.v1.ExecutionService/WatchActions", policy(true, false, 0, Watch)),
            ("/streamer.processor.v1.WorkerService/Work", policy(false, false, 0, Session)),
            ("/streamer.progress.v1.ProgressService/ListEvents", read),
            ("/streamer.progress.v1.ProgressService/Watch", policy(true, true, 0, Watch)),
            ("/streamer.router.v1.RouterService/Cancel", read),
            ("/streamer.router.v1.RouterService/Get", read),
            ("/streamer.router.v1.RouterService/List", read),
            ("/streamer.router.v1.RouterService/ListActions", read),
            ("/streamer.router.v1.RouterService/Redrive", once),
            ("/streamer.router.v1.RouterService/RedriveMany", once),
            ("/streamer.router.v1.RouterService/Submit", policy(true, false, 0, Unspecified)),
            ("/streamer.router.v1.RouterService/SubmitAndWatch", policy(true, false, 0, Watch)),
        ];
        let all: Vec<_> = EXTERNAL.iter().chain(DECLARED).copied().collect();
        assert_eq!(all, expected);
        assert!(expected.is_sorted_by_key(|(path, _)| path));
        for (path, policy) in expected {
            assert_eq!(method_policy(path), policy, "{path}");
        }
    }

    #[test]
    fn calls_of_unknown_methods_are_not_retried() {
        let unknown = [
            "",
            "/",
            "/streamer.router.v1.RouterService/Ge",
            "/streamer.router.v1.RouterService/Get/",
            "/other.Service/Get",
        ];
        for path in unknown {
            assert_eq!(method_policy(path), MethodPolicy::NOT_IDEMPOTENT, "{path}");
        }
    }

    #[test]
    fn only_watches_that_retry_no_submission_move_to_a_different_instance() {
        let methods = DECLARED.iter().chain(&EXTERNAL);
        let movable = methods.filter(|(_, policy)| policy.is_movable_watch());
        let movable: Vec<_> = movable.map(|(path, _)| *path).collect();
        assert_eq!(movable, ["/streamer.progress.v1.ProgressService/Watch"]);
    }

    #[test]
    fn public_methods_have_a_policy_and_publish_their_idempotency_level() {
        let policies: BTreeSet<_> = DECLARED.iter().chain(&EXTERNAL).map(|entry| entry.0).collect();
        for method in public_methods() {
            assert!(policies.contains(method.path.as_str()), "{}", method.path);
        }
        let files = FileDescriptorSet::decode(PUBLIC_DESCRIPTOR_SET).unwrap().file;
        let ours = files.iter().filter(|file| file.package().starts_with("streamer."));
        let services = ours.flat_map(|file| &file.service);
        for method in services.flat_map(|service| &service.method) {
            // The presence of the option, not its default value.
            let options = method.options.as_ref();
            assert!(options.is_some_and(|o| o.idempotency_level.is_some()), "{}", method.name());
        }
    }
}
