//! Which tables there are: the one place that creating, checking and the CloudFormation template
//! all come from.

mod cloudformation;
mod manage;

use aws_sdk_dynamodb::types::ScalarAttributeType;

pub use cloudformation::cloudformation;
pub use manage::{Difference, check, create};

/// A table.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Its name, after the prefix.
    pub name: &'static str,
    /// What it holds.
    pub holds: &'static str,
    /// Name of the partition key and, if there is one, of the sort key. All are text.
    pub key: &'static [&'static str],
    /// Its global secondary indexes.
    pub indexes: &'static [Index],
    /// Whether changes of its items go into a stream, with the new image.
    pub stream: bool,
}

/// A global secondary index.
#[derive(Clone, Copy, Debug)]
pub struct Index {
    /// Its name.
    pub name: &'static str,
    /// Partition key (text), sort key and type of that.
    pub key: (&'static str, &'static str, KeyType),
    /// What it holds beside keys.
    pub projection: Projection,
}

/// Type of a sort key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// Text.
    Text,
    /// A number.
    Number,
}

/// What an index holds beside keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    /// Nothing.
    KeysOnly,
    /// These attributes.
    Include(&'static [&'static str]),
    /// Everything.
    All,
}

/// Attribute that says when an item may be removed: seconds since the Unix epoch.
pub const TIME_TO_LIVE: &str = "remove_after";

const fn index(
    name: &'static str,
    key: (&'static str, &'static str, KeyType),
    projection: Projection,
) -> Index {
    Index { name, key, projection }
}

/// All tables.
pub const TABLES: [Table; 5] = [
    Table {
        name: "requests",
        holds: "a request: its state and its latest events",
        key: &["uid"],
        indexes: &[
            index(
                "queue",
                ("queue_shard", "queue_rank", KeyType::Text),
                Projection::Include(&["user"]),
            ),
            index(
                "running",
                ("lease_holder", "uid", KeyType::Text),
                Projection::Include(&["attempt", "cancel_reason"]),
            ),
            index("delayed", ("delay_shard", "delay_until", KeyType::Number), Projection::KeysOnly),
            index("expiring", ("expiry_shard", "expire_at", KeyType::Number), Projection::KeysOnly),
            index(
                "tenant",
                ("tenant_shard", "uid", KeyType::Text),
                Projection::Include(&["user", "action"]),
            ),
        ],
        stream: true,
    },
    Table {
        name: "parts",
        holds: "what does not fit into a request's item: older events, payload, checkpoint",
        key: &["uid", "part"],
        indexes: &[],
        stream: false,
    },
    Table {
        name: "names",
        holds: "which request a caller's own id stands for",
        key: &["name"],
        indexes: &[],
        stream: false,
    },
    Table {
        name: "connections",
        holds: "open WebSocket connections",
        key: &["id"],
        indexes: &[
            index("tenant", ("tenant_shard", "id", KeyType::Text), Projection::All),
            index("gateway", ("gateway", "id", KeyType::Text), Projection::KeysOnly),
        ],
        stream: false,
    },
    Table {
        name: "fleet",
        holds: "processors, gateways and what actions they declared",
        key: &["kind", "name"],
        indexes: &[],
        stream: false,
    },
];

impl KeyType {
    fn scalar(self) -> ScalarAttributeType {
        match self {
            Self::Text => ScalarAttributeType::S,
            Self::Number => ScalarAttributeType::N,
        }
    }
}

impl Table {
    /// Every attribute that is part of a key, with its type, each once, by name.
    pub(crate) fn key_attributes(&self) -> Vec<(&'static str, ScalarAttributeType)> {
        let own = self.key.iter().map(|name| (*name, ScalarAttributeType::S));
        let of_indexes = self.indexes.iter().flat_map(|index| {
            let (partition, sort, kind) = index.key;
            [(partition, ScalarAttributeType::S), (sort, kind.scalar())]
        });
        let mut attributes: Vec<_> = own.chain(of_indexes).collect();
        attributes.sort_by_key(|(name, _)| *name);
        attributes.dedup_by_key(|(name, _)| *name);
        attributes
    }
}
