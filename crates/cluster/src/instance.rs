//! Instances of a service, and the order in which to call them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use http::Request;
use streamer_core::Uid;
use streamer_rpc::{Channel, end_when};
use tokio::sync::watch;
use tonic::{Status, body::Body};
use tower::{ServiceExt, util::BoxCloneSyncService};

use crate::Service;

/// One instance of a service.
#[derive(Clone)]
pub struct Instance {
    /// Address, which identifies the instance.
    pub name: Arc<str>,
    /// Channel to the instance.
    pub channel: Channel,
    unreachable: Arc<AtomicBool>,
    /// Whether the instance may serve watches.
    healthy: Arc<watch::Sender<bool>>,
}

impl Instance {
    /// Returns an instance that is reachable and healthy.
    #[must_use]
    pub fn new(name: &str, channel: Channel) -> Self {
        let healthy = Arc::new(watch::Sender::new(true));
        Self { name: name.into(), channel, unreachable: Arc::default(), healthy }
    }

    /// Returns whether the last call reached the instance. The owner of the list probes unreachable
    /// instances.
    #[must_use]
    pub fn is_reachable(&self) -> bool {
        !self.unreachable.load(Ordering::Relaxed)
    }

    /// Records whether a call reached the instance.
    pub fn record_reachable(&self, reachable: bool) {
        self.unreachable.store(!reachable, Ordering::Relaxed);
    }

    /// Sets whether the instance may serve watches. If not, its watches end with UNAVAILABLE, so that
    /// they continue at a different instance.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.send_if_modified(|current| std::mem::replace(current, healthy) != healthy);
    }

    /// Returns a channel for watches, which end when the instance becomes unhealthy.
    #[must_use]
    pub fn watch_channel(&self) -> Channel {
        if matches!(self.channel, Channel::Local(_)) {
            // An instance in this process is as healthy as its caller.
            return self.channel.clone();
        }
        let instance = self.clone();
        Channel::Remote(BoxCloneSyncService::new(tower::service_fn(
            move |request: Request<Body>| {
                let instance = instance.clone();
                async move {
                    let response = instance.channel.clone().oneshot(request).await?;
                    Ok(response.map(|body| instance.end_when_unhealthy(body)))
                }
            },
        )))
    }

    pub(crate) fn end_when_unhealthy(&self, body: Body) -> Body {
        let unhealthy = self.wait_until_unhealthy();
        end_when(body, async move {
            unhealthy.await;
            Status::unavailable("the instance that served this watch is down; resume the watch")
        })
    }

    /// Returns a future that completes when the instance may no longer serve watches.
    fn wait_until_unhealthy(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut healthy = self.healthy.subscribe();
        async move {
            if healthy.wait_for(|healthy| !healthy).await.is_err() {
                // The instance was removed and is not probed: the watch ends with its connection.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns the rendezvous weight for a key, which is the same in every process.
    fn weight(&self, key: Uid) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in self.name.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        // Finalizer of SplitMix64: every input bit affects every output bit.
        let mut mixed = hash ^ key.spread();
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Currently known instances of a service.
#[derive(Clone)]
pub struct Instances {
    list: watch::Receiver<Arc<[Instance]>>,
    /// Channel to the only instance, if it runs in this process.
    local: Option<Channel>,
    service: Service,
}

impl Instances {
    /// Returns the single instance in this process.
    #[must_use]
    pub fn one(service: Service, channel: Channel) -> Self {
        let list: Arc<[Instance]> = Arc::new([Instance::new("local", channel.clone())]);
        Self { list: watch::channel(list).1, local: Some(channel), service }
    }

    /// Returns the instances in a list that can change.
    #[must_use]
    pub fn of(service: Service, list: watch::Receiver<Arc<[Instance]>>) -> Self {
        Self { list, local: None, service }
    }

    /// Returns whether the service runs in this process.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// Returns the channel to the only instance, if it runs in this process.
    pub(crate) fn local_channel(&self) -> Option<&Channel> {
        self.local.as_ref()
    }

    /// Returns the service.
    #[must_use]
    pub fn service(&self) -> Service {
        self.service
    }

    /// Returns the currently known instances.
    #[must_use]
    pub fn all(&self) -> Arc<[Instance]> {
        self.list.borrow().clone()
    }

    /// Waits until the list changes; never returns if it cannot change.
    pub async fn changed(&mut self) {
        if self.list.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns the instance that ranks first for the key, even if it is unreachable.
    #[must_use]
    pub fn owner(&self, key: Uid) -> Option<Instance> {
        self.all().iter().max_by_key(|instance| instance.weight(key)).cloned()
    }

    /// Returns the instances in the order in which to try them.
    pub(crate) fn ranked(&self, key: Option<Uid>, round_robin: &AtomicUsize) -> Vec<Instance> {
        let mut instances = self.all().to_vec();
        match key {
            Some(key) => {
                instances.sort_by_key(|instance| std::cmp::Reverse(instance.weight(key)));
            }
            None if !instances.is_empty() => {
                let first = round_robin.fetch_add(1, Ordering::Relaxed) % instances.len();
                instances.rotate_left(first);
            }
            None => {}
        }
        // The sort is stable: unreachable instances are last, in the same order.
        instances.sort_by_key(|instance| !instance.is_reachable());
        instances
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use streamer_core::Timestamp;

    use super::*;

    fn instances(names: &[&str]) -> Instances {
        let channel = || {
            Channel::Remote(BoxCloneSyncService::new(tower::service_fn(|_: Request<Body>| async {
                Err(Status::unimplemented("in tests"))
            })))
        };
        let list: Vec<_> = names.iter().map(|name| Instance::new(name, channel())).collect();
        Instances::of(Service::Router, watch::channel(list.into()).1)
    }

    #[test]
    fn keys_are_distributed_evenly_and_keep_their_instance_when_others_leave() {
        let three = instances(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
        let two = instances(&["10.0.0.1:80", "10.0.0.3:80"]);
        let mut counts: HashMap<Arc<str>, u32> = HashMap::new();
        for _ in 0..3000 {
            let key = Uid::new(Timestamp::default());
            let owner = three.owner(key).unwrap().name;
            if &*owner != "10.0.0.2:80" {
                assert_eq!(two.owner(key).unwrap().name, owner);
            }
            *counts.entry(owner).or_default() += 1;
        }
        assert!(counts.values().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn unreachable_instances_rank_last() {
        let three = instances(&["a", "b", "c"]);
        let key = Uid::new(Timestamp::default());
        let round_robin = AtomicUsize::new(0);
        let names = |instances: Vec<Instance>| {
            instances.into_iter().map(|one| one.name).collect::<Vec<_>>()
        };
        let before = names(three.ranked(Some(key), &round_robin));
        three
            .all()
            .iter()
            .find(|instance| instance.name == before[0])
            .unwrap()
            .record_reachable(false);
        let after = names(three.ranked(Some(key), &round_robin));
        assert_eq!(after, [before[1].clone(), before[2].clone(), before[0].clone()]);
    }
}
