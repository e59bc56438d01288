//! Definition of the tables. It is used to create and check the tables, and to generate the CloudFormation template.

mod cloudformation;
mod manage;

use aws_sdk_dynamodb::types::ScalarAttributeType;

pub use cloudformation::{Alarm, Statistic, cloudformation};
pub use manage::{Difference, check, create};

/// Definition of a table.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Name without the prefix.
    pub name: &'static str,
    /// Description of its items.
    pub holds: &'static str,
    /// Names of the partition key and of the sort key, if any. Both are strings.
    pub key: &'static [&'static str],
    /// Global secondary indexes.
    pub indexes: &'static [Index],
    /// Whether changes of items are written to a stream, which contains the new image of each item.
    pub stream: bool,
}

/// Definition of a global secondary index.
#[derive(Clone, Copy, Debug)]
pub struct Index {
    /// Name.
    pub name: &'static str,
    /// Partition key (a string), sort key, and type of the sort key.
    pub key: (&'static str, &'static str, KeyType),
    /// Projected attributes in addition to the keys.
    pub projection: Projection,
}

/// Type of a sort key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// A string.
    Text,
    /// A number.
    Number,
}

/// Projected attributes of an index in addition to the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    /// No other attributes.
    KeysOnly,
    /// The given attributes.
    Include(&'static [&'static str]),
    /// All attributes.
    All,
}

/// Name of the time-to-live attribute, whose value is in seconds since the Unix epoch.
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
        holds: "values that do not fit into a request's item: older events, payload, checkpoint",
        key: &["uid", "part"],
        indexes: &[],
        stream: false,
    },
    Table {
        name: "names",
        holds: "the request that a client id identifies",
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
        holds: "processors, gateways, stream shards and declared actions",
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
    /// Returns each key attribute once, with its type, in the order of the names.
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
